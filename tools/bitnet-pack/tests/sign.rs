//! Keys, signatures and what they are worth, by the command.
mod common;

use common::{Place, named, stories};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Output};

/// Runs the command in a folder; what it says, and whether it succeeded.
fn run(folder: &Path, words: &str) -> (bool, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bitnet-pack"));
    let Output { status, stdout, stderr } = command.args(words.split(' ')).current_dir(folder).output().unwrap();
    (status.success(), String::from_utf8([stdout, stderr].concat()).unwrap())
}

#[test]
fn what_is_signed_is_verified_until_it_changes() {
    let place = Place::new();
    let folder = place.out();
    let image = folder.join("a.bitnet");
    bitnet_pack::pack(&stories(), &image, &named(), &mut ()).unwrap();
    let said = |words: &str| {
        let (success, text) = run(&folder, words);
        assert!(success, "{words}: {text}");
        text
    };
    let refused = |words: &str| {
        let (success, text) = run(&folder, words);
        assert!(!success, "{words}: {text}");
        text
    };
    assert!(said("keygen -o key.pem").contains("key.pub.pem"));
    let mode = |name: &str| folder.join(name).metadata().unwrap().permissions().mode() & 0o777;
    assert_eq!(mode("key.pem"), 0o600);
    assert!(refused("keygen -o key.pem").contains("File exists"), "keys are not written over");
    said("keygen -o other.pem");
    let keys = ["key.pem", "other.pem"].map(|name| std::fs::read(folder.join(name)).unwrap());
    assert_ne!(keys[0], keys[1]);

    assert!(refused("verify a.bitnet --public-key key.pub.pem").contains("the image needs a signature"));
    said("sign a.bitnet --key key.pem");
    assert_eq!(folder.join("a.bitnet.sig").metadata().unwrap().len(), 64);
    assert!(said("verify a.bitnet --public-key key.pub.pem").contains("a.bitnet: sound, signed ("));
    assert!(said("verify a.bitnet").contains("a.bitnet: sound ("));
    let other = "the signature is not that of this image by this key";
    assert!(refused("verify a.bitnet --public-key other.pub.pem").contains(other));
    assert!(refused("verify a.bitnet --public-key key.pem").contains("a private key, where the public one"));
    assert!(refused("sign a.bitnet --key key.pub.pem").contains("a public key, where the private one"));

    // Padding that no checksum knows: the signature does.
    let mut bytes = std::fs::read(&image).unwrap();
    let header = 64 + u32::from_le_bytes(bytes[12..16].try_into().unwrap()) as usize;
    assert!(!header.is_multiple_of(64), "there is padding");
    bytes[header] ^= 1;
    std::fs::write(&image, bytes).unwrap();
    assert!(refused("verify a.bitnet --public-key key.pub.pem").contains(other));
    assert!(refused("sign a.bitnet --key key.pem").contains("padding that is not zero"), "signed is what is sound");
}
