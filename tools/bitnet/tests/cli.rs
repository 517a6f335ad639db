//! The command as scripts and people use it.
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::LazyLock;

/// The bundled model, packed once.
static IMAGE: LazyLock<(tempfile::TempDir, PathBuf)> = LazyLock::new(|| {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("stories.bitnet");
    let checkpoint = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/stories-ternary");
    bitnet_pack::pack(&checkpoint, &image, &bitnet_pack::Options::default(), &mut ()).unwrap();
    (dir, image)
});

/// What transformers says after "Once upon a time", 24 tokens of it.
const STORY: &str = "Once upon a time, there was a little girl named Lily. She loved to play outside in the s";

fn image() -> &'static str {
    IMAGE.1.to_str().unwrap()
}

fn bitnet(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bitnet"));
    command.args(args).env_remove("BITNET_BACKEND").stdin(Stdio::null());
    command
}

/// Runs the command, which must succeed, and returns what it printed.
fn output(args: &[&str]) -> String {
    let Output { status, stdout, stderr } = bitnet(args).output().unwrap();
    assert!(status.success(), "{args:?}: {}", String::from_utf8_lossy(&stderr));
    String::from_utf8(stdout).unwrap()
}

/// Runs the command, which must fail with this code, and returns its message.
fn failure(args: &[&str], code: i32) -> String {
    let Output { status, stdout, stderr } = bitnet(args).output().unwrap();
    assert_eq!(status.code(), Some(code), "{args:?}: {}", String::from_utf8_lossy(&stdout));
    let message = String::from_utf8(stderr).unwrap();
    assert!(!message.contains("panicked"), "{message}");
    message
}

/// Runs the command with this standard input.
fn with_input(args: &[&str], input: &str) -> Output {
    let mut command = bitnet(args);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

/// A signed image is taken wherever its weights lie, and no other.
#[test]
fn run_with_a_key_takes_what_it_signed() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (signed, key) = (path("signed.bitnet"), path("key.pem"));
    std::fs::copy(image(), &signed).unwrap();
    let public = bitnet_pack::sign::keygen(Path::new(&key)).unwrap();
    bitnet_pack::sign::sign(Path::new(&signed), Path::new(&key), &mut ()).unwrap();
    let public = public.to_str().unwrap();
    let run = |source: &'static str| {
        let place = ["--source", source, "--require-signature", public];
        let words = ["run", &signed, "Once upon a time", "--temperature", "0", "--max-tokens", "24"];
        bitnet(&[&words[..], &place].concat()).output().unwrap()
    };
    let sources = ["resident", "mapped", "streamed"];
    for source in sources {
        assert_eq!(String::from_utf8(run(source).stdout).unwrap(), format!("{STORY}\n"), "{source}");
    }
    // A byte of a weight, which no checksum is compared with here.
    let mut bytes = std::fs::read(&signed).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&signed, bytes).unwrap();
    for source in sources {
        let error = String::from_utf8(run(source).stderr).unwrap();
        assert!(error.contains("the signature is not that of this image"), "{source}: {error}");
    }
    let error = failure(&["run", image(), "Once", "--require-signature", public], 1);
    assert!(error.contains("the image needs a signature"), "{error}");
}

fn greedy<'a>(prompt: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&["run", image(), prompt, "--temperature", "0", "--max-tokens", "24"], more].concat()
}

#[test]
fn run_tells_the_story_however_it_is_run() {
    let expected = format!("{STORY}\n");
    assert_eq!(output(&greedy("Once upon a time", &[])), expected);
    for more in [
        ["--backend", "portable"],
        ["--threads", "1"],
        ["--threads", "3"],
        ["--threads", "auto"],
        ["--prefill-threads", "2"],
        ["--pin", "--threads=2"],
        ["--lookup", "--threads=2"],
        ["--lookup", "--batch=1"],
        ["--source", "mapped"],
        ["--source", "resident"],
        ["--source", "streamed"],
        ["--source=streamed", "--verify-stream"],
        ["--source=streamed", "--ram=64M"],
        ["--ram", "1G"],
        ["--batch", "1"],
        ["--batch", "16"],
        ["--context", "64"],
    ] {
        assert_eq!(output(&greedy("Once upon a time", &more)), expected, "{more:?}");
    }
    let forced = bitnet(&greedy("Once upon a time", &["--stats", "--lookup"]))
        .env("BITNET_BACKEND", "portable")
        .output()
        .unwrap();
    assert_eq!(String::from_utf8(forced.stdout).unwrap(), expected);
    let stats = String::from_utf8(forced.stderr).unwrap();
    for line in [
        "prefill: 5 tokens",
        "decode: 24 tokens",
        "lookup: ",
        " tokens a pass",
        "backend: portable",
        "image size:",
        "RAM planned:",
        "RAM used:",
    ] {
        assert!(stats.contains(line), "{line} in {stats}");
    }
}

#[test]
fn prompts_come_from_arguments_files_and_standard_input() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("prompt.txt");
    std::fs::write(&file, "Once upon a time").unwrap();
    let options = ["--temperature", "0", "--max-tokens", "24"];
    let from_file = output(&[&["run", image(), "--file", file.to_str().unwrap()], &options[..]].concat());
    assert_eq!(from_file, format!("{STORY}\n"));
    for prompt in [&["-"][..], &[]] {
        let args = [&["run", image()], prompt, &options[..]].concat();
        let piped = with_input(&args, "Once upon a time");
        assert_eq!(String::from_utf8(piped.stdout).unwrap(), format!("{STORY}\n"));
    }
    let message = failure(&["run", image(), "--file", dir.path().to_str().unwrap()], 1);
    assert!(message.contains("is not a file"), "{message}");
}

#[test]
fn ids_go_in_and_out() {
    let expected = "432,383,286,261,376,298,315,421\n";
    let options = ["--temperature", "0", "--max-tokens", "8", "--print-ids"];
    let run = |prompt: &[&str]| output(&[&["run", image()], prompt, &options[..]].concat());
    assert_eq!(run(&["Once upon a time"]), expected);
    assert_eq!(run(&["--ids", "1,403,407,261,378"]), expected);
    assert!(failure(&["run", image(), "--ids", "1,512"], 1).contains("token 512 is outside the vocabulary of 512"));
}

#[test]
fn stop_strings_end_the_text() {
    let text = output(&greedy("Once upon a time", &["--no-echo", "--stop", "Lily", "--stop", "dragon"]));
    assert_eq!(text, ", there was a little girl named \n");
}

#[test]
fn a_seed_repeats_a_text() {
    let run = |seed| output(&["run", image(), "The", "--seed", seed, "--max-tokens", "30"]);
    assert_eq!(run("1"), run("1"));
    assert_ne!(run("1"), run("2"));
}

/// Whoever reads our output may go away.
#[test]
fn a_closed_pipe_is_no_failure() {
    let mut child = bitnet(&["run", image(), "The", "--max-tokens", "400"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let Output { status, stderr, .. } = child.wait_with_output().unwrap();
    assert!(status.success());
    assert_eq!(String::from_utf8(stderr).unwrap(), "");
}

#[test]
fn bench_reports_what_scripts_read() {
    let args =
        ["bench", image(), "--threads", "2", "--json", "--tokens", "4", "--prompt-tokens", "8", "--repetitions", "2"];
    let report: serde_json::Value = serde_json::from_str(&output(&args)).unwrap();
    for field in [
        "prefill_tokens_per_s",
        "decode_tokens_per_s",
        "bytes_per_token",
        "read_gb_per_s",
        "bandwidth_share",
        "plan_bytes",
        "peak_rss_bytes",
        "threads",
        "prefill_threads",
    ] {
        assert!(report[field].as_f64().unwrap() > 0.0, "{field} in {report}");
    }
    assert!(report["backend"].is_string());
    assert!(report["threads_because"].as_str().unwrap().contains("decode 2 threads (fixed)"), "{report}");
    let bytes = std::fs::metadata(image()).unwrap().len();
    assert!(report["plan_bytes"].as_u64().unwrap() > bytes, "the image is resident and part of the plan");
    assert!(output(&args[..4]).contains("tokens/s"));
    // Keys and values of 400 positions more: 4 layers, 4 heads of 32, half precision.
    let late: serde_json::Value = serde_json::from_str(&output(&[&args[..], &["--position", "408"]].concat())).unwrap();
    let read = |report: &serde_json::Value| report["bytes_per_token"].as_u64().unwrap();
    assert_eq!(read(&late) - read(&report), 400 * 4 * 4 * 32 * 2 * 2);
    let turns: serde_json::Value =
        serde_json::from_str(&output(&[&args[..], &["--position", "8,408"]].concat())).unwrap();
    assert_eq!((&turns["position"], &turns["others"][0]["position"]), (&8.into(), &408.into()));
    assert!(turns["others"][0]["times_as_long"].as_f64().unwrap() > 0.0 && turns["others"][1].is_null(), "{turns}");
    for position in ["510", "8,510"] {
        assert!(failure(&[&args[..], &["--position", position]].concat(), 1).contains("beyond the context of 512"));
    }
}

#[test]
fn logits_are_an_array_that_numpy_reads() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("logits.npy");
    output(&["logits", image(), "--ids", "1,17,255", "--out", out.to_str().unwrap()]);
    let bytes = std::fs::read(&out).unwrap();
    assert_eq!(bytes[..8], *b"\x93NUMPY\x01\x00");
    let header = 10 + usize::from(u16::from_le_bytes([bytes[8], bytes[9]]));
    assert!(header.is_multiple_of(64));
    let text = std::str::from_utf8(&bytes[10..header]).unwrap();
    assert!(text.starts_with("{'descr': '<f4', 'fortran_order': False, 'shape': (3, 512), }"), "{text}");
    assert!(text.ends_with('\n'));
    assert_eq!(bytes.len() - header, 3 * 512 * 4);
}

#[test]
fn perplexity_is_low_on_a_story_and_high_on_noise() {
    let dir = tempfile::tempdir().unwrap();
    let score = |text: &str| {
        let file = dir.path().join("text");
        std::fs::write(&file, text).unwrap();
        let json = output(&["perplexity", image(), file.to_str().unwrap(), "--json"]);
        let report: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!(
            report["bytes"].as_u64().unwrap() as usize,
            text.len() + 1,
            "the space before the first word counts"
        );
        report["nats_per_token"].as_f64().unwrap()
    };
    let story = score("Once upon a time, there was a little girl named Lily. She loved to play outside.");
    let noise = score("outside. play was upon Lily She there time, Once a a girl to little loved named");
    assert!(story < 1.5 && noise > 3.0, "{story} {noise}");
}

/// Ids in place of a text: pieces share a token, so that every token but the first is scored, whatever their length.
#[test]
fn perplexity_of_token_ids() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("ids");
    let bytes: Vec<u8> = [1u16, 403, 407, 261, 378, 403, 407].iter().flat_map(|id| id.to_le_bytes()).collect();
    std::fs::write(&file, &bytes).unwrap();
    let file = file.to_str().unwrap();
    let score = |piece: &str| {
        let json = output(&["perplexity", image(), file, "--ids", piece, "--json"]);
        let report: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!(report["tokens"], 6);
        report["nats_per_token"].as_f64().unwrap()
    };
    assert_eq!(score("6"), score("100"));
    assert!(score("6") < score("1"), "tokens before it say something of a token");
    std::fs::write(file, &bytes[1..]).unwrap();
    assert!(failure(&["perplexity", image(), file, "--ids", "6"], 1).contains("odd number of bytes"));
    std::fs::write(file, [0, 0, 0, 2]).unwrap();
    assert!(failure(&["perplexity", image(), file, "--ids", "6"], 1).contains("beyond the 512 of the model"));
}

/// The same image has no divergence; one with a coarser head has some, and as much either way of counting as the sum says.
#[test]
fn perplexity_against_another_image() {
    let dir = tempfile::tempdir().unwrap();
    let (file, coarse) = (dir.path().join("text"), dir.path().join("coarse.bitnet"));
    let story = "Once upon a time, there was a little girl named Lily. She loved to play outside.";
    std::fs::write(&file, story).unwrap();
    let checkpoint = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/stories-ternary");
    let options = bitnet_pack::Options { head: bitnet_kernel::Format::I4, ..Default::default() };
    bitnet_pack::pack(&checkpoint, &coarse, &options, &mut ()).unwrap();
    let (file, coarse) = (file.to_str().unwrap(), coarse.to_str().unwrap());
    let report = |image, against| {
        let json = output(&["perplexity", image, file, "--against", against, "--json", "--threads", "2"]);
        let json: serde_json::Value = serde_json::from_str(&json).unwrap();
        ["kl_nats_per_token", "same_best", "perplexity", "perplexity_against"].map(|key| json[key].as_f64().unwrap())
    };
    let [kl, same, perplexity, against] = report(image(), image());
    assert!(kl == 0.0 && same == 1.0 && perplexity == against, "{kl} {same} {perplexity} {against}");
    let [kl, same, perplexity, against] = report(coarse, image());
    assert!(kl > 1e-4 && kl < 0.5 && same > 0.5 && perplexity != against, "{kl} {same} {perplexity} {against}");
    let alone: serde_json::Value = serde_json::from_str(&output(&["perplexity", image(), file, "--json"])).unwrap();
    assert_eq!(alone["perplexity"].as_f64(), Some(against));
    assert!(output(&["perplexity", coarse, file, "--against", image()]).contains("the same best token in "));
}

#[test]
fn selftest_says_what_runs() {
    let text = output(&["selftest"]);
    assert!(text.contains("portable      the reference"), "{text}");
    assert!(!text.contains("WRONG"), "{text}");
    assert!(text.contains("in use: "), "{text}");
    assert!(output(&["selftest", "--backend", "portable"]).contains("same as portable"));
}

#[test]
fn chat_without_a_template_says_so() {
    assert!(failure(&["chat", image()], 1).contains("no chat template"));
}

#[test]
fn wrong_files_are_named_and_explained() {
    let dir = tempfile::tempdir().unwrap();
    let whole = std::fs::read(image()).unwrap();
    let cases: [(&str, &[u8], &str); 8] = [
        ("empty", b"", "the file is empty"),
        ("lfs", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-LFS pointer"),
        ("html", b"<!DOCTYPE html><html>", "HTML page"),
        ("gguf", b"GGUF\x03\0\0\0", "bitnet-pack pack"),
        ("ggjt", b"tjgg\x01\0\0\0", "GGJT"),
        ("noise", b"some other file entirely", "not an image"),
        ("short", &whole[..20], "20 bytes"),
        ("cut", &whole[..whole.len() - 4096], "truncated"),
    ];
    for (name, bytes, expected) in cases {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        let message = failure(&["run", path.to_str().unwrap(), "x"], 1);
        assert!(message.starts_with("error: ") && message.contains(name), "{message}");
        assert!(message.contains(expected), "{name}: {message}");
    }
    assert!(failure(&["run", dir.path().to_str().unwrap(), "x"], 1).contains("is a directory"));
    assert!(failure(&["run", "/nonexistent/image", "x"], 1).contains("/nonexistent/image"));
}

#[test]
fn wrong_usage_is_code_2() {
    for args in [
        &["run"][..],
        &["frobnicate"],
        &["run", image(), "x", "--backend", "abacus"],
        &["run", image(), "x", "--top-p", "1.5"],
        &["run", image(), "x", "--temperature", "nan"],
        &["run", image(), "x", "--ids", "1"],
        &["run", image(), "x", "--threads", "0"],
        &["run", image(), "x", "--threads", "257"],
        &["run", image(), "x", "--threads", "Auto"],
        &["run", image(), "x", "--prefill-threads", "-1"],
        &["run", image(), "x", "--stop", ""],
    ] {
        failure(args, 2);
    }
    let message = failure(&["run", image(), "x", "--context", "100000"], 1);
    assert!(message.contains("context of 100000 asked for, 1 to 512 possible"), "{message}");
}

/// C17: whole numbers at and beyond the ends of their types are refused as usage or with the range there is, and never wrap.
#[test]
fn numbers_out_of_range_are_refused() {
    let (wide, negative) = (u64::MAX.to_string() + "0", "-1");
    for option in ["--context", "--max-tokens", "--top-k", "--threads", "--seed", "--batch"] {
        for value in [&*wide, negative, "1e3", "0x10", ""] {
            failure(&["run", image(), "x", &format!("{option}={value}")], 2);
        }
    }
    for value in ["4294967295", "512", "2147483648"] {
        let message = failure(&["run", image(), &format!("--ids={value}"), "--max-tokens=1"], 1);
        assert!(message.contains(&format!("token {value} is outside the vocabulary of 512")), "{message}");
    }
    for (option, value, expected) in [
        ("--context", "0", "context of 0 asked for, 1 to 512 possible"),
        ("--context", "4294967295", "context of 4294967295 asked for"),
        ("--batch", "0", "batch of 0 asked for, 1 to 16 possible"),
        ("--batch", "4294967295", "batch of 4294967295 asked for"),
    ] {
        let message = failure(&["run", image(), "x", &format!("{option}={value}")], 1);
        assert!(message.contains(expected), "{message}");
    }
}

/// Replay A-18: a small image may plan for more memory than there is; that is said before any is taken.
#[test]
fn a_plan_beyond_the_machine_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("wide");
    let preset = bitnet_pack::Preset::Tiny.shape();
    let config = bitnet_runtime::Config { context: 1 << 20, layers: 64, head_dim: 256, ..preset.config };
    let shape = bitnet_pack::Shape { config, ..preset };
    let options = bitnet_pack::Options { context: Some(1 << 20), ..Default::default() };
    bitnet_pack::dummy(&path, &shape, &options, 1, &mut ()).unwrap();
    let run = ["run", path.to_str().unwrap(), "--ids", "1", "--print-ids", "--max-tokens", "2"];
    let message = failure(&run, 1);
    assert!(message.contains("a context of 1048576 needs") && message.contains("--context"), "{message}");
    assert!(output(&[&run[..], &["--context", "16"]].concat()).contains(','));
}

/// What fits --ram stays in memory, the rest is streamed; what does not fit at all is refused, with the least that would.
#[test]
fn ram_is_a_promise() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("large");
    let preset = bitnet_pack::Preset::Tiny.shape();
    let config = bitnet_runtime::Config { vocab: 1 << 16, hidden: 1024, ..preset.config };
    let options = bitnet_pack::Options { context: Some(64), ..Default::default() };
    bitnet_pack::dummy(&path, &bitnet_pack::Shape { config, ..preset }, &options, 1, &mut ()).unwrap();
    let run = |more: &[&str]| {
        let args =
            [&["run", path.to_str().unwrap(), "--ids", "1", "--print-ids", "--max-tokens", "3", "--stats"], more];
        let Output { status, stdout, stderr } = bitnet(&args.concat()).output().unwrap();
        let stderr = String::from_utf8(stderr).unwrap();
        assert!(status.success(), "{more:?}: {stderr}");
        (String::from_utf8(stdout).unwrap(), stderr)
    };
    let resident = run(&["--source", "resident"]);
    let timeline = dir.path().join("timeline.json");
    let (ids, stats) = run(&["--ram", "64M", "--timeline", timeline.to_str().unwrap()]);
    assert_eq!(ids, resident.0);
    assert!(stats.contains("(streaming: it needs") && stats.contains("stream: "), "{stats}");
    let timeline: serde_json::Value = serde_json::from_slice(&std::fs::read(timeline).unwrap()).unwrap();
    assert!(timeline["traceEvents"].as_array().unwrap().iter().any(|event| event["name"] == "read"));
    let refused =
        |more: &[&str]| failure(&[&["run", path.to_str().unwrap(), "--ids", "1", "--print-ids"], more].concat(), 1);
    let message = refused(&["--ram", "6M"]);
    let least = message.split("needs at least ").nth(1).and_then(|m| m.split(' ').next()).unwrap();
    assert!(message.contains("conversation of 64 tokens") && message.contains("--ram gives 6.0 MiB"), "{message}");
    // What is said to be enough is enough; a mebibyte for what differs from one start to the next.
    let least = format!("{}K", ((least.parse::<f64>().unwrap() + 1.0) * 1024.0) as u64);
    assert_eq!(run(&["--ram", &least]).0, resident.0);
    assert!(refused(&["--source", "resident", "--ram", "64M"]).contains("resident it needs"));
    assert!(refused(&["--source", "mapped", "--ram", "64M"]).contains("--ram says nothing of mapped weights"));
    failure(&["run", path.to_str().unwrap(), "x", "--ram", "64X"], 2);
}

/// Notes on standard error are no reason to fail when nobody reads them.
#[test]
fn a_closed_standard_error_is_no_failure() {
    let mut child = bitnet(&greedy("Once upon a time", &["--stats"]))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stderr.take());
    let Output { status, stdout, .. } = child.wait_with_output().unwrap();
    assert!(status.success());
    assert_eq!(String::from_utf8(stdout).unwrap(), format!("{STORY}\n"));
}
