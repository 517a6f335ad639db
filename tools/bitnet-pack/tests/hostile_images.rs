//! Files that are not sound images, and whether they are refused: with the reason, at once, and without much memory.
mod common;

use bitnet_kernel::{Block, Format};
use bitnet_pack::verify::Opened;
use bitnet_pack::{Error, Options, inspect, pack, verify};
use bitnet_runtime::image::{
    Encoding, HEADER_BYTES_MAX, Header, Kind, MemoryPlan, Record, Section, StopIds, checksum, expected_sections,
};
use bitnet_runtime::memory::KvFormat;
use bitnet_runtime::parallel::Serial;
use bitnet_runtime::source::Mapped;
use bitnet_runtime::{Config, Image, Model, Plan, backend};
use cap::Cap;
use common::{Checkpoint, Place, SMALL, Storage, assert_says, named, stories};
use kitoken::Kitoken;
use std::alloc::System;
use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use zerocopy::IntoBytes;

/// Whoever asks for more, all tests of this file together, ends the process.
#[global_allocator]
static ALLOCATOR: Cap<System> = Cap::new(System, 64 << 20);

const QUICK: Duration = Duration::from_millis(100);

/// Runs what must take under 100 ms. A machine that is busy with something else has more tries.
fn quick<T>(what: &str, f: impl Fn() -> T) -> T {
    for attempt in 1.. {
        let start = Instant::now();
        let result = f();
        let took = start.elapsed();
        if took < QUICK {
            return result;
        }
        assert!(attempt < 20, "{what}: {took:?}");
    }
    unreachable!()
}

fn refused(what: &str, path: &Path) -> String {
    match quick(what, || verify(path)) {
        Ok(_) => panic!("{what}: it must be refused"),
        Err(e) => e.to_string(),
    }
}

/// The trained model as an image, tokenizer included.
fn real() -> (Place, PathBuf, Vec<u8>) {
    let place = Place::new();
    pack(&stories(), &place.image(), &Options::default(), &mut ()).unwrap();
    let image = place.image();
    let bytes = std::fs::read(&image).unwrap();
    (place, image, bytes)
}

/// A small one: everything has a tail. Fast enough to be written for every case.
fn small(options: Options) -> (Place, Vec<u8>) {
    let place = Place::new();
    Checkpoint::new(SMALL, Storage::Multiply).write(&place.source());
    let bytes = place.pack(&options);
    (place, bytes)
}

fn header_len(image: &[u8]) -> usize {
    u32::from_le_bytes(image[12..16].try_into().unwrap()) as usize
}

/// Makes the header's checksum right again, as docs/image-format.md says it is computed.
fn repair(image: &mut [u8]) {
    let end = (64 + header_len(image)).min(image.len());
    image[24..32].fill(0);
    let sums = [checksum(&image[..64]).to_le_bytes(), checksum(&image[64..end]).to_le_bytes()].concat();
    image[24..32].copy_from_slice(&checksum(&sums).to_le_bytes());
}

fn records(image: &[u8]) -> Vec<Record> {
    let checked = Image::check(image, image.len() as u64).unwrap();
    checked.sections().records().to_vec()
}

/// The image with another header, its checksum right. Sections stay where they are.
fn with_header(image: &[u8], change: impl FnOnce(&mut Header<'_>, &mut Vec<Record>)) -> Vec<u8> {
    let checked = Image::check(image, image.len() as u64).unwrap();
    let (mut header, mut table) = (*checked.header(), records(image));
    change(&mut header, &mut table);
    let table = table.as_bytes();
    // Unless the table itself was replaced.
    let same = header.sections.as_ptr() == checked.header().sections.as_ptr();
    let header = Header { sections: if same { table } else { header.sections }, ..header };
    let mut buffer = vec![0; 2 << 20];
    let encoded = postcard::to_slice(&header, &mut buffer).unwrap();
    with_encoded(image, encoded)
}

fn with_encoded(image: &[u8], header: &[u8]) -> Vec<u8> {
    let mut changed = image.to_vec();
    let end = 64 + header.len();
    if changed.len() < end {
        changed.resize(end, 0);
    }
    changed[64..end].copy_from_slice(header);
    changed[12..16].copy_from_slice(&(header.len() as u32).to_le_bytes());
    let length = changed.len() as u64;
    changed[16..24].copy_from_slice(&length.to_le_bytes());
    repair(&mut changed);
    changed
}

fn encoded(header: &Header<'_>) -> Vec<u8> {
    let mut buffer = vec![0; 1 << 20];
    postcard::to_slice(header, &mut buffer).unwrap().to_vec()
}

/// What the validator says of an image in memory.
fn check(what: &str, image: &[u8]) -> String {
    match quick(what, || Image::check(image, image.len() as u64).err()) {
        None => panic!("{what}: it must be refused"),
        Some(e) => e.to_string(),
    }
}

/// a download that was cut off, at every byte of the header and every 4 KiB after it.
#[test]
fn cut_at_every_length() {
    let (_place, path, bytes) = real();
    let header = 64 + header_len(&bytes);
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    let after = (header..bytes.len()).step_by(4096).chain([bytes.len() - 1]);
    let mut cuts: Vec<usize> = (0..header).chain(after).collect();
    cuts.sort_unstable();
    for cut in cuts.into_iter().rev() {
        file.set_len(cut as u64).unwrap();
        let message = refused(&format!("cut at {cut}"), &path);
        let expected = match cut {
            0 => "empty".to_string(),
            1..64 => format!("{cut} bytes, an image has at least 64"),
            _ if cut < header => format!("the header should have {} bytes, at most {}", header - 64, cut - 64),
            _ => format!("ends at byte {cut} and should have {}: truncated", bytes.len()),
        };
        assert_says(&format!("cut at {cut}"), &message, &[&expected, "image.bitnet"]);
    }
}

/// Any single wrong bit of the prefix and the header.
#[test]
fn every_bit_of_the_header() {
    let (_place, path, bytes) = real();
    let mut file = OpenOptions::new().write(true).open(&path).unwrap();
    let mut put = |at: usize, byte: u8| {
        file.seek(SeekFrom::Start(at as u64)).unwrap();
        file.write_all(&[byte]).unwrap();
    };
    for (at, &byte) in bytes[..64 + header_len(&bytes)].iter().enumerate() {
        for bit in 0..8 {
            put(at, byte ^ 1 << bit);
            let what = format!("bit {bit} of byte {at}");
            let message = refused(&what, &path);
            let expected = match at {
                0..8 => "not an image",
                8..12 => "image version",
                // The length then is another one, which may be within the file.
                12..16 => "header",
                _ => "checksum disagrees",
            };
            assert_says(&what, &message, &[expected]);
        }
        put(at, byte);
    }
    verify(&path).unwrap();
}

/// A wrong bit in any section, and in the zeros between: the validator does not read them, `verify` does.
#[test]
fn bits_of_every_section() {
    let (_place, path, bytes) = real();
    let mut file = OpenOptions::new().write(true).open(&path).unwrap();
    let mut places: Vec<(usize, String)> = Vec::new();
    for (i, record) in records(&bytes).iter().enumerate() {
        let start = record.start.get() as usize * 64;
        let length = record.blocks.get() as usize * 64;
        for at in [0, length / 2, length - 1] {
            places.push((start + at, format!("the checksum of section {i} (")));
        }
    }
    let weights = records(&bytes)[1].start.get() as usize * 64;
    for at in [64 + header_len(&bytes), weights - 1] {
        places.push((at, format!("byte {at}: padding that is not zero")));
    }
    for (at, expected) in places {
        let bit = at % 8;
        let what = format!("bit {bit} of byte {at}");
        for byte in [bytes[at] ^ 1 << bit, bytes[at]] {
            file.seek(SeekFrom::Start(at as u64)).unwrap();
            file.write_all(&[byte]).unwrap();
            if byte != bytes[at] {
                assert!(Opened::open(&path).unwrap().image().is_ok(), "{what}: the validator does not look there");
                assert_says(&what, &verify(&path).unwrap_err().to_string(), &[&expected]);
            }
        }
    }
    verify(&path).unwrap();
}

/// sizes that overflow when they are multiplied, added or rounded up; the checksum is right.
const SIZES: [u32; 12] = [
    0,
    1,
    2,
    (1 << 26) - 1,
    (1 << 26) + 1,
    1 << 30,
    (1 << 31) - 1,
    1 << 31,
    (1 << 31) + 1,
    u32::MAX - 63,
    u32::MAX - 1,
    u32::MAX,
];

#[test]
fn sizes_in_the_section_table() {
    let (_place, image) = small(named());
    let (_place2, _, tokenized) = real();
    type Set = fn(&mut Record, u32) -> bool;
    let fields: [(&str, Set); 4] = [
        ("shape", |r, v| core::mem::replace(&mut r.rows, v.into()).get() != v),
        ("shape", |r, v| core::mem::replace(&mut r.cols, v.into()).get() != v),
        ("position", |r, v| core::mem::replace(&mut r.start, v.into()).get() != v),
        ("length", |r, v| core::mem::replace(&mut r.blocks, v.into()).get() != v),
    ];
    for image in [&image, &tokenized] {
        for (i, record) in records(image).iter().enumerate() {
            for (field, set) in fields {
                for value in SIZES {
                    if !set(&mut record.clone(), value) {
                        continue;
                    }
                    let what = format!("section {i}, {field} = {value}");
                    let message = check(&what, &with_header(image, |_, table| _ = set(&mut table[i], value)));
                    // A tokenizer's length is its own affair: then its blocks disagree, or the limit is exceeded.
                    let field = if record.kind == Kind::Tokenizer as u8 && field == "shape" { "its" } else { field };
                    assert_says(&what, &message, &[&format!("section {i} should be "), field, "disagrees"]);
                }
            }
        }
    }
}

#[test]
fn other_fields_of_the_section_table() {
    let (_place, image) = small(named());
    let count = records(&image).len();
    type Change = fn(&mut Vec<Record>);
    let cases: [(&str, Change, &str); 13] = [
        ("unknown kind", |t| t[3].kind = 255, "section 3 should be key: its kind"),
        ("kinds swapped", |t| t.swap(2, 3), "section 2 should be query: its kind"),
        ("another layer", |t| t[2].layer = 1.into(), "section 2 should be query: its layer"),
        ("no layer", |t| t[2].layer = u16::MAX.into(), "section 2 should be query: its layer"),
        ("unknown encoding", |t| t[2].encoding = 31, "section 2 should be query: its encoding"),
        ("a linear by rows", |t| t[2].encoding = Format::T2R as u8, "section 2 should be query: its encoding"),
        ("a norm as bytes", |t| t[1].encoding = Encoding::Bytes.tag(), "section 1 should be attention_norm: its enc"),
        ("another format", |t| t[2].encoding = Format::T2 as u8, "section 2 should be query: its length"),
        ("scale not a number", |t| t[2].scale = f32::NAN.into(), "section 2 should be query: its scale"),
        ("scale infinite", |t| t[2].scale = f32::INFINITY.into(), "section 2 should be query: its scale"),
        ("a vector's scale", |t| t[1].scale = 2.0.into(), "section 1 should be attention_norm: its scale"),
        ("one missing", |t| _ = t.pop(), "24 sections, the configuration needs 25"),
        ("one too many", |t| t.push(t[0]), "26 sections, the configuration needs 25"),
    ];
    assert_eq!(count, 25);
    for (what, change, expected) in cases {
        assert_says(what, &check(what, &with_header(&image, |_, table| change(table))), &[expected]);
    }
    // A header so much longer that the weights would have to start elsewhere.
    let what = "as many as a header holds";
    let many = with_header(&image, |_, table| table.resize(32_000, table[0]));
    assert_says(what, &check(what, &many), &["section 0 should be rope_frequencies: its position"]);
    for bytes in [0usize, 1, 31, 33] {
        let what = format!("a table of {bytes} bytes");
        let table = vec![0; bytes];
        let mut header = *Image::check(&image, image.len() as u64).unwrap().header();
        header.sections = &table;
        let expected = if bytes == 0 { "0 sections" } else { "does not decode" };
        assert_says(&what, &check(&what, &with_encoded(&image, &encoded(&header))), &[expected]);
    }
}

/// Every number of the configuration beyond its limits; the checksum is right.
#[test]
fn configurations_out_of_range() {
    let (_place, image) = small(named());
    type Change = fn(&mut Config, u32);
    let limits: [(&str, Change, &[u32]); 9] = [
        ("vocab", |c, v| c.vocab = v, &[0, Config::VOCAB_MAX + 1, 1 << 31, u32::MAX]),
        ("hidden", |c, v| c.hidden = v, &[0, Config::WIDTH_MAX + 1, 1 << 31, u32::MAX]),
        ("ffn", |c, v| c.ffn = v, &[0, Config::WIDTH_MAX + 1, 1 << 31, u32::MAX]),
        ("layers", |c, v| c.layers = v, &[0, Config::LAYERS_MAX + 1, 1 << 31, u32::MAX]),
        ("heads", |c, v| c.heads = v, &[0, Config::WIDTH_MAX + 1, 1 << 31, u32::MAX]),
        ("kv_heads", |c, v| c.kv_heads = v, &[0, 3, 1 << 31, u32::MAX]),
        ("head_dim", |c, v| c.head_dim = v, &[0, 1, 17, Config::HEAD_DIM_MAX + 2, 1 << 31, u32::MAX]),
        ("context", |c, v| c.context = v, &[0, Config::CONTEXT_MAX + 1, 1 << 31, u32::MAX]),
        ("formats", |c, v| c.formats = v as u16, &[0, 1, 1 << Format::F16 as u8, 0xffff]),
    ];
    for (field, change, values) in limits {
        for &value in values {
            let what = format!("{field} = {value}");
            let message = check(&what, &with_header(&image, |h, _| change(&mut h.config, value)));
            let shown =
                format!("{field} = {} is outside its limits", if field == "formats" { value & 0xffff } else { value });
            assert_says(&what, &message, &[&shown]);
        }
    }
    type Set = fn(&mut Header<'_>);
    let others: [(&str, Set, &str); 15] = [
        // Each within its own limit, the product beyond.
        ("heads * head_dim", |h| (h.config.heads, h.config.head_dim) = (65_536, 512), "heads * head_dim = 33554432"),
        ("epsilon 1", |h| h.config.norm_eps = 1.0, "norm_eps"),
        ("epsilon negative", |h| h.config.norm_eps = -1e-5, "norm_eps"),
        ("epsilon NaN", |h| h.config.norm_eps = f32::NAN, "norm_eps"),
        ("own epsilon NaN", |h| h.config.linear_norm_eps = Some(f32::NAN), "linear_norm_eps"),
        (
            "own norms without sections",
            |h| h.config.linear_norm_eps = Some(1e-5),
            "section 2 should be query_input_norm",
        ),
        ("sub-norms not asked for", |h| h.config.sub_norms = false, "section 5 should be output: its kind"),
        ("untied", |h| h.config.tied = false, "section 1 should be embedding: its kind"),
        ("a layer less", |h| h.config.layers = 1, "section 12 should be final_norm: its kind"),
        ("a format too many", |h| h.config.formats |= 1 << Format::T2 as u8, "formats"),
        ("first token", |h| h.text.bos = Some(41), "bos = 41"),
        ("stop token", |h| h.text.stop = StopIds::new(&[2, 41]).unwrap(), "stop ids = 41"),
        ("context of the plan", |h| h.plan.limits.context = 65, "planned context or batch"),
        ("no context", |h| h.plan.limits.context = 0, "planned context or batch"),
        ("batch of the plan", |h| h.plan.limits.batch = 17, "planned context or batch"),
    ];
    for (what, set, expected) in others {
        assert_says(what, &check(what, &with_header(&image, |h, _| set(h))), &[expected]);
    }
    let long = "x".repeat(65_537);
    let mut header = *Image::check(&image, image.len() as u64).unwrap().header();
    header.text.chat_template = &long;
    let message = check("chat template", &with_encoded(&image, &encoded(&header)));
    assert_says("chat template", &message, &["chat template length = 65537"]);
}

/// Sizes that another version of the runtime recorded, larger or smaller, make no image unsound: this version goes by its own,
/// and tells both numbers where they differ, or where it is given what was recorded and needs more.
#[test]
fn plans_of_other_versions() {
    let (place, image) = small(named());
    let header = *Image::check(&image, image.len() as u64).unwrap().header();
    let (limits, own) = (header.plan.limits, Plan::new(&header.config, &header.plan.limits));
    type Change = fn(&mut MemoryPlan);
    let changes: [(&str, Change); 4] = [
        ("the same", |_| {}),
        ("more", |plan| plan.scratch += 3),
        ("less", |plan| plan.scratch -= 1),
        ("nonsense", |plan| plan.sampler = u64::MAX),
    ];
    for (what, change) in changes {
        let changed = with_header(&image, |header, _| change(&mut header.plan));
        let checked = Image::check(&changed, changed.len() as u64).unwrap_or_else(|e| panic!("{what}: {e}"));
        let recorded = checked.header().plan.scratch as usize;
        std::fs::write(place.image(), &changed).unwrap();
        verify(&place.image()).unwrap_or_else(|e| panic!("{what}: {e}"));
        let summary = inspect(&place.image()).unwrap();
        assert_eq!(summary.to_json()["plan"]["total_bytes"], own.bytes(), "{what}");
        let text = summary.to_string();
        assert_eq!(text.contains("the version that packed it needs"), what != "the same", "{what}: {text}");
        let mut scratch = vec![Block::ZERO; recorded];
        let blocks: Vec<Block> = changed.chunks_exact(64).map(|b| Block(b.try_into().unwrap())).collect();
        let mut source = Mapped::new(&blocks);
        let model = Model::new(&checked, limits, backend::best(), &Serial, &mut source, &mut scratch).map(drop);
        if recorded < own.scratch {
            let message = model.unwrap_err().to_string();
            assert_says(what, &message, &[&(own.scratch * 64).to_string(), &(recorded * 64).to_string()]);
        } else {
            model.unwrap_or_else(|e| panic!("{what}: {e}"));
        }
    }
}

/// Everything in it agrees, and it claims terabytes: the file's length gives it away, before anything is sized by it.
#[test]
fn the_largest_that_agrees_with_itself() {
    let (_place, image) = small(named());
    let claiming = |layers: u32| {
        with_header(&image, |header, table| {
            let c = &mut header.config;
            (c.vocab, c.hidden, c.ffn, c.layers) = (1 << 20, 65_536, 65_536, layers);
            (c.heads, c.kv_heads, c.head_dim, c.context) = (128, 128, 512, 1 << 20);
            header.plan.limits.context = 1 << 20;
            let mut at = u64::from(table[0].start.get());
            let section = |s: Section| {
                let encoding = match s.kind {
                    Kind::Head => Encoding::Matrix(Format::I8),
                    _ if s.rows > 1 => Encoding::Matrix(Format::TL),
                    _ => Encoding::Vector,
                };
                let blocks = encoding.blocks(s.rows, s.cols);
                let mut record = table[0];
                (record.kind, record.encoding) = (s.kind as u8, encoding.tag());
                record.layer = s.layer.map_or(u16::MAX, |l| l as u16).into();
                (record.rows, record.cols) = (s.rows.into(), s.cols.into());
                (record.start, record.blocks) = ((at as u32).into(), (blocks as u32).into());
                at += blocks;
                record
            };
            *table = expected_sections(c).map(section).collect();
        })
    };
    let message = check("20 layers", &claiming(20));
    assert_says("20 layers", &message, &[&format!("ends at byte {} and should have 19", image.len()), "truncated"]);
    // Block numbers beyond 32 bits, which wrapped would be small ones.
    assert_says("40 layers", &check("40 layers", &claiming(40)), &["should be head: its end disagrees"]);
}

/// Bytes that postcard has no meaning for, each found as the byte in which two good headers differ.
#[test]
fn encodings_that_do_not_decode() {
    let (_place, image) = small(named());
    let original = *Image::check(&image, image.len() as u64).unwrap().header();
    let bytes = encoded(&original);
    type Set = fn(&mut Header<'_>);
    let cases: [(&str, Set, u8, &str); 8] = [
        ("activation 2", |h| h.config.activation = bitnet_runtime::model::Activation::Silu, 2, "does not decode"),
        ("rope 2", |h| h.config.rope = bitnet_runtime::model::Rope::Interleaved, 2, "does not decode"),
        ("a boolean of 2", |h| h.config.sub_norms = false, 2, "does not decode"),
        ("an option of 2", |h| h.config.linear_norm_eps = Some(0.0), 2, "does not decode"),
        ("keys and values as 3", |h| h.plan.limits.kv = KvFormat::I8, 3, "does not decode"),
        ("a name that is not UTF-8", |h| h.provenance.name = "tesx", 0xff, "does not decode"),
        ("a number without end", |h| h.config.vocab = 42, 0xff, ""),
        ("a table longer than the header", |h| h.sections = &h.sections[..32], 0xff, ""),
    ];
    for (what, set, value, expected) in cases {
        let mut other = original;
        set(&mut other);
        let other = encoded(&other);
        let at = bytes.iter().zip(&other).position(|(a, b)| a != b).expect("they differ");
        let mut changed = bytes.clone();
        changed[at] = value;
        assert_says(what, &check(what, &with_encoded(&image, &changed)), &[expected]);
    }
    // Nine stop tokens: the count is the byte in which one token 0 and two differ.
    let count = |ids: &[u32]| {
        let mut header = original;
        header.text.stop = StopIds::new(ids).unwrap();
        encoded(&header)
    };
    let (one, two) = (count(&[0]), count(&[0, 0]));
    let at = one.iter().zip(&two).position(|(a, b)| a != b).unwrap();
    for value in [9, 127] {
        let mut changed = one.clone();
        changed[at] = value;
        assert_says("stop tokens", &check("stop tokens", &with_encoded(&image, &changed)), &["stop ids"]);
    }
    let mut longer = bytes.clone();
    longer.push(0);
    assert_says("a byte too many", &check("a byte too many", &with_encoded(&image, &longer)), &["does not decode"]);
    // Cut at every length, so that the decoder itself meets the end, with everything before it right.
    for cut in 0..bytes.len() {
        let what = format!("decoder at {cut}");
        assert_says(&what, &check(&what, &with_encoded(&image, &bytes[..cut])), &["does not decode"]);
    }
}

/// Fields of the prefix; the checksum is right where the validator would otherwise stop at it.
#[test]
fn prefixes() {
    let (place, image) = small(named());
    let path = place.image();
    for version in [0, 1, 3, u32::MAX] {
        let mut changed = image.clone();
        changed[8..12].copy_from_slice(&version.to_le_bytes());
        repair(&mut changed);
        std::fs::write(&path, &changed).unwrap();
        let message = refused("version", &path);
        assert_says("version", &message, &[&format!("image version {version}, this runtime reads version 2")]);
    }
    for length in [HEADER_BYTES_MAX + 1, 1 << 31, u32::MAX - 63, u32::MAX] {
        let mut changed = image.clone();
        changed[12..16].copy_from_slice(&length.to_le_bytes());
        repair(&mut changed);
        std::fs::write(&path, &changed).unwrap();
        let message = refused("header length", &path);
        assert_says("header length", &message, &[&format!("should have {length} bytes, at most 1048576")]);
    }
    for length in [0, image.len() as u64 - 1, image.len() as u64 + 1, u64::MAX] {
        let mut changed = image.clone();
        changed[16..24].copy_from_slice(&length.to_le_bytes());
        repair(&mut changed);
        std::fs::write(&path, &changed).unwrap();
        let message = refused("file length", &path);
        assert_says("file length", &message, &[&length.to_string(), &image.len().to_string()]);
    }
    for at in 32..64 {
        let mut changed = image.clone();
        changed[at] = 1;
        repair(&mut changed);
        std::fs::write(&path, &changed).unwrap();
        assert_says("reserved", &refused("reserved", &path), &[&format!("byte {at} must be zero and is not")]);
    }
    for more in [1, 64, 4096] {
        let mut changed = image.clone();
        changed.resize(image.len() + more, 0xa5);
        std::fs::write(&path, &changed).unwrap();
        let expected = format!("the file has {} bytes and should have {}", changed.len(), image.len());
        assert_says("more bytes", &refused("more bytes", &path), &[&expected]);
    }
}

/// what people pass by mistake. Each is told what it is.
#[test]
fn other_files() {
    let place = Place::new();
    let lfs = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4996440\n";
    let cases: [(&str, &[u8], &str); 11] = [
        ("LFS pointer", lfs.as_bytes(), "git-LFS pointer, not the file itself"),
        ("HTML", b"<!DOCTYPE html>\n<html>", "web page"),
        ("HTML after spaces", b"\n  <html><body>404", "web page"),
        ("GGUF", b"GGUF\x03\0\0\0\0\0\0\0", "GGUF"),
        ("GGJT", b"tjgg\x01\0\0\0", "GGJT"),
        ("safetensors", b"\x40\0\0\0\0\0\0\0{\"a\":", "pack it first"),
        ("zip", b"PK\x03\x04\x14\0", "zip"),
        ("empty", b"", "empty"),
        ("one byte of the magic", b"\x89", "1 bytes, an image has at least 64"),
        ("magic damaged by a transfer as text", b"\x89BITNET\r\n", "not an image"),
        ("noise", &[0x5a; 4096], "not an image"),
    ];
    for (what, bytes, expected) in cases {
        place.put("file", bytes);
        assert_says(what, &refused(what, &place.source().join("file")), &[expected, "file"]);
    }
    assert_says("directory", &refused("directory", &place.source()), &["a directory, where a file is expected"]);
    assert_says("missing", &refused("missing", &place.source().join("none")), &["cannot open", "none"]);
}

/// A pipe without a writer: opening it would wait for ever.
#[cfg(unix)]
#[test]
fn a_pipe() {
    let place = Place::new();
    let pipe = place.source().join("pipe");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let (send, receive) = std::sync::mpsc::channel();
    std::thread::spawn(move || send.send(refused("pipe", &pipe)));
    let message = receive.recv_timeout(Duration::from_secs(60)).expect("it must not wait for a writer");
    assert_says("pipe", &message, &["not a regular file", "pipe"]);
}

/// Contents that the checksums do not tell: both are right again after each change. Only `verify` looks.
#[test]
fn contents_with_right_checksums() {
    struct Case {
        what: &'static str,
        format: Format,
        head: Format,
        kind: Kind,
        /// The byte in the section, given its length; the value.
        at: fn(usize) -> usize,
        value: &'static [u8],
        expected: &'static str,
    }
    let case = |what, format, head, kind, at, value, expected| Case { what, format, head, kind, at, value, expected };
    let (tl, t2, i4, i8, f16) = (Format::TL, Format::T2, Format::I4, Format::I8, Format::F16);
    // Scales of the head's 41 rows: the last 3 blocks, of which the last 7 numbers stand for no row.
    let cases = [
        case("T2 code 3, first plane", t2, i8, Kind::Query, |_| 0, &[0b0101_0111], "layer 0: query: code 3"),
        case("T2 code 3, last plane", t2, i8, Kind::Down, |n| n - 1, &[0b1101_0101], "layer 0: down: code 3"),
        case("TL nibble 14, low", tl, i8, Kind::Query, |_| 64, &[0x0e], "nibble 14 or 15"),
        case("TL nibble 15, low", tl, i8, Kind::Query, |_| 128, &[0x0f], "nibble 14 or 15"),
        case(
            "TL nibble 14, high",
            tl,
            i8,
            Kind::Gate,
            |n| n - 1,
            &[0xe0],
            "layer 0: gate: nibble 14 or 15 in rows from 64",
        ),
        case("I8 -128", i8, i8, Kind::Query, |_| 0, &[0x80], "layer 0: query: -128"),
        case("I8 -128 in the head", tl, i8, Kind::Head, |_| 63, &[0x80], "head: -128"),
        case("F16 infinity", tl, f16, Kind::Head, |_| 0, &[0x00, 0x7c], "head: a value that is not finite"),
        case("F16 NaN", tl, f16, Kind::Head, |n| n - 2, &[0x01, 0xfe], "head: a value that is not finite"),
        case("row scale NaN", tl, i8, Kind::Head, |n| n - 192, &[0, 0, 0xc0, 0x7f], "head: the scale of row 0 is NaN"),
        case(
            "row scale infinite",
            tl,
            i4,
            Kind::Head,
            |n| n - 32,
            &[0, 0, 0x80, 0x7f],
            "head: the scale of row 40 is inf",
        ),
        case("scale without a row", tl, i8, Kind::Head, |n| n - 4, &[0, 0, 0x80, 0x3f], "the scale of row 47 is 1"),
        case("norm NaN", tl, i8, Kind::FinalNorm, |_| 4, &[0, 0, 0xc0, 0x7f], "final_norm: element 1 is NaN"),
        case("norm's padding", tl, i8, Kind::FinalNorm, |n| n - 4, &[0, 0, 0x80, 0x3f], "final_norm: element 47 is 1"),
    ];
    for Case { what, format, head, kind, at, value, expected } in cases {
        let (place, image) = small(Options { format, head, ..named() });
        change_section(&place.image(), &image, kind, at, value);
        let message = refused(what, &place.image());
        assert_says(what, &message, &[expected, "byte "]);
    }
}

/// The same for a head in two planes. Most of all its bounds: with one that is too low the wrong token could
/// be the best, and nobody would see it.
#[test]
fn bounds_of_a_head_in_two_planes() {
    // More columns than are apart, or the low plane has nothing.
    let place = Place::new();
    Checkpoint::new(common::Shape { hidden: 70, ..SMALL }, Storage::Multiply).write(&place.source());
    let image = place.pack(&Options { split_head: true, ..named() });
    let start = records(&image).iter().find(|r| r.kind == Kind::HeadNorms as u8).unwrap().start.get() as usize * 64;
    // Row 1 of 41, of which the last three blocks of a matrix have the scales.
    let norm = u16::from_le_bytes(image[start + 2..start + 4].try_into().unwrap());
    change_section(&place.image(), &image, Kind::HeadNorms, |_| 2, &(norm - 1).to_le_bytes());
    assert_says("norm", &refused("norm", &place.image()), &["head_norms: row 1: its norm is too low"]);
    change_section(&place.image(), &image, Kind::HeadNorms, |_| 82, &[1]);
    assert_says("rows", &refused("rows", &place.image()), &["head_norms: row 41: padding"]);
    for plane in [Kind::Head, Kind::HeadLow] {
        change_section(&place.image(), &image, plane, |n| n - 188, &1.5f32.to_le_bytes());
        assert_says(
            "scale",
            &refused("scale", &place.image()),
            &["head_norms: row 1: the scales of its planes differ"],
        );
    }
    for step in [0.0f32, -0.0, 1.5, -1.0, 256.0, 1e30] {
        change_section(&place.image(), &image, Kind::HeadApart, |n| n - 188, &step.to_le_bytes());
        assert_says("step", &refused("step", &place.image()), &["head_norms: row 1: its step is no whole number"]);
    }
    // The high plane of another format, of which so few columns take as many blocks, and sections that are not there.
    let (_place, image) = small(Options { split_head: true, ..named() });
    let i8 = Encoding::Matrix(Format::I8).tag();
    let changed = with_header(&image, |_, table| {
        table.iter_mut().find(|r| r.kind == Kind::Head as u8).unwrap().encoding = i8;
    });
    assert_says("encoding", &check("encoding", &changed), &["should be head: its encoding disagrees"]);
    let changed = with_header(&image, |header, _| header.config.split_head = false);
    assert_says("one plane", &check("one plane", &changed), &["should be head: its kind disagrees"]);
}

/// The same for a tokenizer: bytes that are none, and bytes after its end.
#[test]
fn tokenizers_with_right_checksums() {
    let (_place, path, image) = real();
    change_section(&path, &image, Kind::Tokenizer, |_| 0, &[0xff; 64]);
    assert_says("tokenizer", &refused("tokenizer", &path), &["the tokenizer does not load"]);
    let length = records(&image)[0].cols.get();
    assert_ne!(length % 64, 0, "or there is no padding to test");
    change_section(&path, &image, Kind::Tokenizer, |n| n - 1, &[1]);
    assert_says("padding", &refused("padding", &path), &["padding that is not zero"]);
}

/// Any byte of a tokenizer changed, its checksum right: it loads as something else or is refused, without a panic and
/// without believing a length. The whole is decoded by a crate that is not ours.
#[test]
fn every_byte_of_a_tokenizer() {
    let (_place, _, image) = real();
    let record = records(&image)[0];
    let start = record.start.get() as usize * 64;
    let mut tokenizer = image[start..start + record.cols.get() as usize].to_vec();
    let mut refused = 0;
    for at in 0..tokenizer.len() {
        let byte = tokenizer[at];
        for value in [0xff, byte ^ 1] {
            tokenizer[at] = value;
            let what = format!("byte {at} = {value:#x}");
            refused += usize::from(quick(&what, || Kitoken::from_slice(&tokenizer).is_err()));
        }
        tokenizer[at] = byte;
    }
    assert!(refused > 1000, "{refused}");
}

fn change_section(path: &Path, image: &[u8], kind: Kind, at: fn(usize) -> usize, value: &[u8]) {
    let mut changed = image.to_vec();
    let i = records(image).iter().position(|r| r.kind == kind as u8).unwrap();
    let record = records(image)[i];
    let (start, length) = (record.start.get() as usize * 64, record.blocks.get() as usize * 64);
    let section = &mut changed[start..start + length];
    section[at(length)..][..value.len()].copy_from_slice(value);
    let sum = checksum(section);
    let mut changed = with_header(image, |_, table| table[i].checksum = sum.into());
    changed[start + at(length)..][..value.len()].copy_from_slice(value);
    File::create(path).and_then(|mut f| f.write_all(&changed)).unwrap();
    assert!(matches!(verify(path), Err(Error::Damaged { .. })), "nothing but the content is wrong: {:?}", verify(path));
}
