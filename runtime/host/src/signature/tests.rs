//! Signatures that RFC 8032 and OpenSSL made, and files that are something else.
use super::{SecretKey, Signed, path};
use std::fs::{self, File};
use std::path::{Path, PathBuf};

/// The second key of RFC 8032, section 7.1, as OpenSSL writes it; anyone may know it.
const SECRET: &str = "-----BEGIN PRIVATE KEY-----\n\
                      MC4CAQAwBQYDK2VwBCIEIEzNCJso/5banbbDRuwRTg9bijGfNaumJNqM9u1PuKb7\n\
                      -----END PRIVATE KEY-----\n";
const PUBLIC: &str = "-----BEGIN PUBLIC KEY-----\n\
                      MCowBQYDK2VwAyEAPUAXw+hDiVqStwqnTRt+vJyYLM8uxJaMwM1V8Sr0Zgw=\n\
                      -----END PUBLIC KEY-----\n";
const SEED: &str = "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb";
/// Of the one byte 0x72, there.
const RFC: &str = "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da\
                   085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00";
/// Of `long()`, by OpenSSL 3.0.19: `openssl pkeyutl -sign -rawin -inkey KEY -in FILE`.
const OPENSSL: &str = "3dfd72a88fd644b50a25852844366097d19a3601101d04b6b2b9d105ba6684b5\
                       b93d547cb098a5a3bbefbd6ecd0467429d4d035bed5a423a8caa2a83fb8e3403";
/// Of a curve for something else, with the same length.
const X25519: &str = "-----BEGIN PUBLIC KEY-----\n\
                      MCowBQYDK2VuAyEASFCzpPsAJ2nmzBxgJQ5E6TR1XrKqOR9i3E9jOUm52XE=\n\
                      -----END PUBLIC KEY-----\n";
/// The neutral element: every signature `R = S·B` is one of every message by it.
const NEUTRAL: &str = "-----BEGIN PUBLIC KEY-----\n\
                       MCowBQYDK2VwAyEAAQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=\n\
                       -----END PUBLIC KEY-----\n";

/// Longer than what is read at once, and no multiple of it.
fn long() -> Vec<u8> {
    (0..600_000u32).map(|i| ((i * 31) ^ (i >> 8)) as u8).collect()
}

fn hex(text: &str) -> Vec<u8> {
    (0..text.len() / 2).map(|i| u8::from_str_radix(&text[2 * i..2 * i + 2], 16).unwrap()).collect()
}

/// A folder with the keys, a file and its signature.
struct Folder(tempfile::TempDir);

impl Folder {
    fn new(image: &[u8], signature: &[u8]) -> Self {
        let folder = Self(tempfile::tempdir().unwrap());
        folder.write("key.pem", SECRET.as_bytes());
        folder.write("public.pem", PUBLIC.as_bytes());
        folder.write("image.sig", signature);
        folder.write("image", image);
        folder
    }
    fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, bytes).unwrap();
        path
    }
    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
    fn check(&self) -> Result<(), String> {
        let signed = Signed::read(&self.path("public.pem"), &self.path("image")).map_err(|e| format!("{e:#}"))?;
        let bytes = fs::read(self.path("image")).unwrap();
        let (start, rest) = bytes.split_at(bytes.len() / 3);
        let whole = signed.check(start, rest).map_err(|e| format!("{e:#}"));
        let file = File::open(self.path("image")).unwrap();
        let by_file = signed.check_file(start, &file).map_err(|e| format!("{e:#}"));
        assert_eq!(whole, by_file);
        whole
    }
}

#[test]
fn signatures_of_others_hold_and_ours_are_the_same() {
    assert_eq!(path(Path::new("a/b.bitnet")), Path::new("a/b.bitnet.sig"));
    for (message, golden) in [(b"\x72".to_vec(), RFC), (long(), OPENSSL)] {
        let golden = hex(golden);
        let folder = Folder::new(&message, &golden);
        assert_eq!(folder.check(), Ok(()));
        let key = SecretKey::read(&folder.path("key.pem")).unwrap();
        let mine = key.sign(&File::open(folder.path("image")).unwrap()).unwrap();
        assert_eq!(mine.as_slice(), golden);
    }
}

#[test]
fn keys_are_written_as_openssl_writes_them() {
    let key = SecretKey::from_seed(&hex(SEED).try_into().unwrap());
    assert_eq!(key.to_pem().unwrap(), (SECRET.to_owned(), PUBLIC.to_owned()));
}

#[test]
fn every_other_byte_is_refused() {
    let (message, golden) = (long(), hex(OPENSSL));
    let other = "the signature is not that of this image by this key: one of the three was changed or is another's";
    for at in [0, message.len() / 2, message.len() - 1] {
        let mut changed = message.clone();
        changed[at] ^= 1;
        assert_eq!(Folder::new(&changed, &golden).check(), Err(other.to_owned()), "byte {at}");
    }
    let longer = [&message[..], &[0]].concat();
    for image in [&message[..message.len() - 1], &longer, &[]] {
        assert_eq!(Folder::new(image, &golden).check(), Err(other.to_owned()), "{} bytes", image.len());
    }
    for bit in 0..8 * golden.len() {
        let mut changed = golden.clone();
        changed[bit / 8] ^= 1 << (bit % 8);
        assert!(Folder::new(b"\x72", &changed).check().is_err(), "bit {bit}");
    }
    // That of another image.
    assert_eq!(Folder::new(&message, &hex(RFC)).check(), Err(other.to_owned()));
}

#[test]
fn what_is_no_signature_is_named() {
    for (bytes, what) in [
        (vec![], "0 bytes, and a signature has 64"),
        (hex(RFC)[..63].to_vec(), "63 bytes, and a signature has 64"),
        ([&hex(RFC)[..], b"\n"].concat(), "65 bytes, and a signature has 64"),
        (RFC.as_bytes().to_vec(), "128 bytes, and a signature has 64"),
        (vec![0xff; 64], "64 bytes that are no signature of Ed25519"),
        (vec![0; 1 << 20], "more than 16384 bytes"),
    ] {
        let error = Folder::new(b"\x72", &bytes).check().unwrap_err();
        assert!(error.contains(what) && error.contains("image.sig"), "{error}");
    }
    let folder = Folder::new(b"\x72", &hex(RFC));
    fs::remove_file(folder.path("image.sig")).unwrap();
    let error = folder.check().unwrap_err();
    assert!(error.contains("needs a signature") && error.contains("image.sig: No such file"), "{error}");
    fs::create_dir(folder.path("image.sig")).unwrap();
    assert!(folder.check().unwrap_err().contains("not a regular file"));
}

#[test]
fn what_is_no_key_is_named() {
    let folder = Folder::new(b"\x72", &hex(RFC));
    let of = |text: &str| (folder.write("public.pem", text.as_bytes()), folder.write("key.pem", text.as_bytes()));
    let ciphered = SECRET.replace("PRIVATE", "ENCRYPTED PRIVATE");
    let ssh = SECRET.replace("PRIVATE", "OPENSSH PRIVATE");
    for (text, public, secret) in [
        ("", "not a key in PEM", "not a key in PEM"),
        ("\u{89}BITNET", "not a key in PEM", "not a key in PEM"),
        (&PUBLIC[..60], "not an Ed25519 key", "a public key, where the private one is expected"),
        (PUBLIC, "", "a public key, where the private one is expected"),
        (SECRET, "a private key, where the public one is expected", ""),
        (X25519, "not an Ed25519 key", "a public key"),
        (NEUTRAL, "whoever likes can sign for this key", "a public key"),
        (&ciphered, "`ENCRYPTED PRIVATE KEY`", "an encrypted key"),
        (&ssh, "`OPENSSH PRIVATE KEY`, where `PUBLIC KEY`", "`OPENSSH PRIVATE KEY`, where `PRIVATE KEY`"),
    ] {
        let (as_public, as_secret) = of(text);
        for (expected, error, name) in [
            (public, Signed::read(&as_public, &folder.path("image")).err(), "public.pem"),
            (secret, SecretKey::read(&as_secret).err(), "key.pem"),
        ] {
            let error = error.map_or(String::new(), |e| format!("{e:#}"));
            assert!(error.contains(expected), "{text}: {error}");
            assert_eq!(error.contains(name), !expected.is_empty(), "{text}: {error}");
        }
    }
}

#[test]
fn another_key_is_refused() {
    let folder = Folder::new(b"\x72", &hex(RFC));
    let (_, other) = SecretKey::from_seed(&[7; 32]).to_pem().unwrap();
    folder.write("public.pem", other.as_bytes());
    assert!(folder.check().unwrap_err().contains("another's"));
}
