//! Every backend of this CPU against the portable one, kernel by kernel, and against the committed fingerprints of whole models.
use bitnet_kernel::Kernels;
use bitnet_kernel::conformance::{Workspace, check};
use bitnet_runtime::backend;
use bitnet_tests::goldens::{Golden, goldens, pack, prompt};
use bitnet_tests::images::{Way, fingerprint};

#[test]
fn every_backend_agrees_with_portable() {
    // The portable one is not compared with itself: that takes it longer than all others together.
    let backends: Vec<_> = backend::available().filter(|k| k.name() != "portable").collect();
    check(&backends, &mut Box::new(Workspace::ZERO)).unwrap_or_else(|difference| panic!("{difference}"));
    for kernels in backends {
        println!("{}: same as portable", kernels.name());
    }
    let runs = |name: &str| backend::available().any(|k| k.name() == name);
    for name in backend::names().filter(|name| !runs(name)) {
        println!("{name}: not for this CPU; it runs {}", backend::best().name());
    }
}

/// One pass of every small model with each format of keys and values: token by token, and in batches whose products are of several
/// tokens at once.
#[test]
fn every_backend_gives_the_committed_bits() {
    for Golden { set, fingerprints } in goldens() {
        let (packed, prompt) = (pack(&set), prompt(&set));
        for kernels in backend::available() {
            for ((kv, expected), batch) in fingerprints.into_iter().zip([1, 7, 16]) {
                let way = Way { kv, batch, ..Way::plain(kernels) };
                let found = fingerprint(&way.logits(&packed, &prompt));
                assert_eq!(found, expected, "{found:#018x}: {set} by {way:?}");
            }
        }
    }
}

/// The list is in order, without doubles, and ends with what runs everywhere.
#[test]
fn backends_have_the_names_they_are_listed_under() {
    let names: Vec<_> = backend::names().collect();
    let available: Vec<_> = backend::available().map(Kernels::name).collect();
    let listed: Vec<_> = names.iter().copied().filter(|name| available.contains(name)).collect();
    assert_eq!(listed, available);
    assert_eq!(available.last(), Some(&"portable"));
    for name in available {
        assert_eq!(backend::by_name(name).map(Kernels::name), Some(name));
    }
    assert!(backend::by_name("abacus").is_none());
}
