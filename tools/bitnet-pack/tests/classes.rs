//! The classes of faults that readers of models have had in public, C1 to C19, and the replays of reported faults that are the
//! packer's: each has a test, and this table says where.
use std::path::Path;

/// Class or replay, what it is, file from the root, test.
const TESTS: [(&str, &str, &str, &str); 27] = [
    ("C1", "a count times an entry's size overflows", GGUF, "c1_counts"),
    ("C2", "number of dimensions out of range", GGUF, "c2_dimension_count"),
    ("C3", "dimensions of zero, negative, or whose product overflows", GGUF, "c3_dimensions"),
    ("C4", "bytes of a tensor overflow", GGUF, "c4_byte_sizes"),
    ("C5", "rounding up wraps", GGUF, "c5_padding"),
    ("C6", "sums of sizes wrap", GGUF, "c6_sums"),
    ("C7", "a tensor lies beyond the file", GGUF, "c7_places"),
    ("C8", "alignment zero, huge, or no power of two", GGUF, "c8_alignment"),
    ("C9", "lengths of strings and arrays", GGUF, "c9_lengths"),
    ("C10", "arrays of another type", GGUF, "c10_arrays"),
    ("C11", "keys of another type, or empty", GGUF, "c11_keys"),
    ("C12", "keys and tensors that occur twice", GGUF, "c12_duplicates"),
    ("C13", "layers beyond what there is", GGUF, "c13_layers"),
    ("C14", "tokens of bytes like <0x-1>", GGUF, "c14_byte_tokens"),
    ("C15", "lengths of tokens, and tokens beyond the vocabulary", GGUF, "c15_tokens"),
    // No state is read from a file: what could be taken back wrongly is a state in memory, after an error.
    ("C16", "a state that is taken back", "tests/tests/end_to_end.rs", "an_error_leaves_the_state_as_it_was"),
    ("C17", "numbers of a person out of range", "tools/bitnet/tests/cli.rs", "numbers_out_of_range_are_refused"),
    ("C18", "headers of safetensors", CHECKPOINTS, "malformed_containers"),
    (
        "C19",
        "lengths in the image's own header",
        "tools/bitnet-pack/tests/hostile_images.rs",
        "encodings_that_do_not_decode",
    ),
    ("A-01", "I2_S in groups of 128 and of 64", "tools/bitnet-pack/tests/gguf.rs", "groups_of_i2_s"),
    ("A-03", "four rows a byte", "tools/bitnet-pack/tests/checkpoints.rs", "four_rows_a_byte"),
    ("A-05", "names of classes", CHECKPOINTS, "class_names"),
    (
        "A-06",
        "killed, or with little memory",
        "tools/bitnet-pack/tests/killed.rs",
        "killed_half_way_nothing_has_the_name",
    ),
    (
        "A-07",
        "how words are split is missing",
        "tools/bitnet-pack/tests/gguf.rs",
        "a_missing_split_is_recovered_or_refused",
    ),
    ("A-14", "sizes that wrap", GGUF, "c4_byte_sizes"),
    ("A-15", "numbers of dimensions", GGUF, "c2_dimension_count"),
    ("A-16", "malformed safetensors", CHECKPOINTS, "malformed_indexes"),
];
const GGUF: &str = "tools/bitnet-pack/tests/hostile_gguf.rs";
const CHECKPOINTS: &str = "tools/bitnet-pack/tests/hostile_checkpoints.rs";

#[test]
fn every_class_has_its_test() {
    for (class, what, file, test) in TESTS {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(file);
        let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{file}: {e}"));
        assert!(text.contains(&format!("#[test]\nfn {test}()")), "{class} ({what}): {file} has no test {test}");
    }
    for class in 1..=19 {
        assert!(TESTS.iter().any(|(name, ..)| *name == format!("C{class}")), "C{class} has no test");
    }
}
