//! `bitnet-pack`: the command a person types to make an image, and to know what is in one.
#![forbid(unsafe_code)]
use bitnet_kernel::{BlockShape, Format};
use bitnet_pack::calibrate::{Adaptive, Rule};
use bitnet_pack::checkpoint::Dtype;
use bitnet_pack::export::Ternary;
use bitnet_pack::{Error, Hybrid, Layouts, Options, Pattern, Preset, Progress, Report, Sparsity, Stateful, Target};
use bitnet_runtime::memory::KvFormat;
use bitnet_runtime::model::{Matrices, Memory, Vector, Window};
use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use clap::{Args, Parser, Subcommand, ValueEnum};
use core::sync::atomic::{AtomicBool, Ordering};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

/// Packs ternary language models into images that `bitnet` runs.
///
/// An image is one file with all that running needs: weights, tokenizer, chat template and a plan of the memory. Packing the
/// same checkpoint twice gives the same bytes.
#[derive(Debug, Parser)]
#[command(version, arg_required_else_help = true, after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Examples:
  bitnet-pack pack ./bitnet-b1.58-2B-4T -o 2b4t.bitnet
  bitnet-pack verify 2b4t.bitnet
  bitnet-pack inspect 2b4t.bitnet
  bitnet-pack sign 2b4t.bitnet --key key.pem
  bitnet-pack diff 2b4t.bitnet other.bitnet
  bitnet-pack export 2b4t.bitnet -o 2b4t.gguf
  bitnet-pack convert ./stories --to-stateful -o ./stateful
  bitnet-pack dummy --preset 2b4t -o dummy.bitnet

Exit codes: 0 done, 1 something failed (the reason is on standard error), 2 wrong usage.";

#[derive(Debug, Subcommand)]
enum Command {
    Pack(Box<Pack>),
    Verify(Verify),
    Keygen(Keygen),
    Sign(Sign),
    Inspect(Inspect),
    Diff(Diff),
    Export(Export),
    Convert(Convert),
    Dummy(Dummy),
}

/// Make an image of a checkpoint.
///
/// Reads models of transformers (BitNetForCausalLM, BitnetForCausalLM, LlamaForCausalLM, Qwen3ForCausalLM,
/// HGRNBitForCausalLM), packed already, as the float masters of training or in plain floats; GGUF files of the architectures bitnet, bitnet-b1.58, bitnet-25,
/// llama and qwen3; and files of llama2.c. Ternary weights stay what they are, bit for bit. Linears that are not ternary are
/// quantized as --dense says, and the error is shown. The image is written under a
/// temporary name, read back and checked, and only then renamed: if anything goes wrong, or on Ctrl-C, nothing is left.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  bitnet-pack pack ./stories -o stories.bitnet
  bitnet-pack pack ./Falcon3-1B-Instruct-1.58bit -o falcon3.bitnet --head i4
  bitnet-pack pack ./model/model.safetensors -o model.bitnet --context 2048 --kv i8
  bitnet-pack pack ggml-model-i2_s.gguf -o 2b4t.bitnet
  bitnet-pack pack ggml-model-i2_s.gguf --dry-run --bandwidth 17
  bitnet-pack pack SmolLM2-135M-Instruct.Q4_1.gguf -o smollm2.bitnet --dense i4
  bitnet-pack pack model.gguf -o model.bitnet --bits auto --calibration text.txt --average-bits 4.2 --report report.html
  bitnet-pack pack ./stories -o small.bitnet --sparsity 0.1 --sparsity-type structured-rowcol --calibration text.txt")]
struct Pack {
    /// The checkpoint: a directory with config.json and model.safetensors (or shards with their index), or that file; or a
    /// GGUF file (the first, if the model is in several); or a file of llama2.c.
    source: PathBuf,
    /// The image to write; an image that is there already is replaced.
    #[arg(short, long, value_name = "IMAGE", required_unless_present = "dry_run")]
    output: Option<PathBuf>,
    /// Write nothing: say what would be written, and how much memory packing and running take. Not with --bits or --plan,
    /// whose formats are known after calibration only.
    #[arg(long, conflicts_with_all = ["bits", "plan_file", "report", "write_plan"])]
    dry_run: bool,
    /// With --dry-run: predict tokens a second on a machine whose memory is read at so many GB/s (of 1,000,000,000 bytes).
    #[arg(long, value_name = "GB/S", requires = "dry_run", value_parser = bandwidth)]
    bandwidth: Option<f64>,
    /// Go on where linears that should be ternary are not: in GGUF files of BitNet's architectures those whose numbers are not
    /// ternary, else masters more than 85% from ternary.
    #[arg(long)]
    lossy: bool,
    /// The tokenizer: tokenizer.json, a sentencepiece model or a tiktoken file [default: the one in the directory, or in the
    /// GGUF file].
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,
    /// Weights in a group of I2_S in a GGUF file: 128, or 64 as bitnet.cpp once wrote on ARM. auto is 128 unless the numbers
    /// speak for 64, and says so where they do, and where they say nothing.
    #[arg(long, value_name = "WEIGHTS", default_value = "auto", value_parser = PossibleValuesParser::new(["auto", "128", "64"]))]
    i2s_group: String,
    /// Choose the layout of each linear with zeros by its speed on a CPU in place of its bytes: native times the layouts here,
    /// on the model's own shapes and zeros; for another CPU a model of costs decides, for ARM with a reserve. What was chosen
    /// and why is shown, and recorded in the image. `bitnet tune` does it again on the device.
    #[arg(long, value_name = "CPU", conflicts_with = "layout", value_parser = target())]
    target_arch: Option<Target>,
    #[command(flatten)]
    formats: Formats,
    #[command(flatten)]
    widths: Widths,
    #[command(flatten)]
    sparsity: SparsityOptions,
    #[command(flatten)]
    plan: PlanOptions,
}

/// Leaves out weights that matter least by the activations of --calibration, and says what that costs on the end of that text.
/// Without training again it costs much: of the feed-forward neurons of the bundled model, a tenth cost 0.03 nats a token, a
/// quarter 0.13, 65 % 0.95.
#[derive(Args, Debug)]
#[command(next_help_heading = "Sparsity")]
struct SparsityOptions {
    /// The share to leave out of each linear, as 0.25.
    #[arg(long, value_name = "SHARE", requires = "calibration")]
    sparsity: Option<f64>,
    /// What is left out together: structured-rowcol is neurons of the feed-forward layer (rows of gate and up, columns of
    /// down); block is 16 by 64 weights, 16 by 16 with --layout 16x16; unstructured is single weights of every row;
    /// 2:4 or another n:m leaves n of every m side by side. The last two make zeros that no layout saves.
    #[arg(long, value_name = "TYPE", requires = "calibration", value_parser = sparsity_type)]
    sparsity_type: Option<SparsityType>,
}

/// A [`Pattern`] whose blocks have no size yet.
#[derive(Clone, Copy, Debug)]
enum SparsityType {
    Neurons,
    Blocks,
    Single,
    Of(u32, u32),
}

fn sparsity_type(text: &str) -> Result<SparsityType, String> {
    let of = || {
        let (n, m) = text.split_once(':')?;
        Some(SparsityType::Of(n.parse().ok()?, m.parse().ok()?))
    };
    match text {
        "structured-rowcol" => Ok(SparsityType::Neurons),
        "block" => Ok(SparsityType::Blocks),
        "unstructured" => Ok(SparsityType::Single),
        _ => of().ok_or_else(|| "structured-rowcol, block, unstructured, or n:m as 2:4".into()),
    }
}

impl SparsityOptions {
    /// What the options ask for, if they ask for anything.
    fn chosen(&self, layout: Layouts, text: Option<&PathBuf>) -> Result<Option<Sparsity>, Error> {
        let (kind, share) = match (self.sparsity_type, self.sparsity) {
            (None, None) => return Ok(None),
            (Some(kind @ SparsityType::Of(n, m)), None) => (kind, 1.0 - f64::from(n) / f64::from(m)),
            (Some(_), None) => return Err(Error::Options("--sparsity-type needs --sparsity".into())),
            (kind, Some(share)) => (kind.unwrap_or(SparsityType::Neurons), share),
        };
        let pattern = match (kind, layout) {
            (SparsityType::Neurons, _) => Pattern::Neurons,
            (SparsityType::Blocks, Layouts::Blocks(shape)) => Pattern::Blocks(shape),
            (SparsityType::Blocks, _) => Pattern::Blocks(BlockShape::Wide),
            (SparsityType::Single, _) => Pattern::Single,
            (SparsityType::Of(n, m), _) => Pattern::Of { n, m },
        };
        let text = text.cloned().ok_or_else(|| Error::Options("--sparsity needs a text: --calibration".into()))?;
        Ok(Some(Sparsity { share, pattern, text }))
    }
}

/// Formats of linears that are not ternary, one by one instead of --dense. With --calibration they are quantized so that each
/// column makes up for the errors of those before it (GPTQ).
#[derive(Args, Debug)]
#[command(next_help_heading = "Linears that are not ternary, one by one")]
struct Widths {
    /// One format for all linears, or auto: the formats that are predicted to lose least within a budget, by default the bytes of
    /// i4 for all; the head is one of them unless --head is given. The prediction is half the diagonal of the Kronecker-factored Fisher information times the
    /// squared error (Martens and Grosse 2015). It costs a forward pass over 8,192 tokens with the products of inputs, the work
    /// of three over 3,072 for gradients with labels drawn from the model, quantizing in six formats, and three passes
    /// over 4,096 tokens of the end of the text, which decide whether the plan is better than one format for
    /// all. Without --calibration, auto is a fixed rule.
    #[arg(long, conflicts_with = "dense", value_parser = PossibleValuesParser::new(["auto", "i2", "i3", "i4", "i8"]))]
    bits: Option<String>,
    /// Budget of auto: bits a weight in these linears, scales and padding included.
    #[arg(long, value_name = "BITS", conflicts_with = "max_size", requires = "calibration", value_parser = average)]
    average_bits: Option<f64>,
    /// Budget of auto: length of the image, as 600M (of 1,000,000 bytes), 80K, 2G or in bytes.
    #[arg(long, value_name = "SIZE", requires = "calibration", value_parser = size)]
    max_size: Option<u64>,
    /// Instead of a budget, with --low: 8 bits for linears that are predicted to lose more nats a token than this as i4.
    #[arg(long, value_name = "NATS", requires_all = ["low", "calibration"], conflicts_with_all = ["average_bits", "max_size"])]
    high: Option<f64>,
    /// With --high: 3 bits for linears that are predicted to lose less than this as i3; the others have 4.
    #[arg(long, value_name = "NATS", requires = "high")]
    low: Option<f64>,
    /// Take formats from a plan, as --write-plan writes it.
    #[arg(long = "plan", value_name = "FILE", conflicts_with_all = ["bits", "dense", "average_bits", "max_size", "high", "low"])]
    plan_file: Option<PathBuf>,
    /// A text of the kind that the model will read, UTF-8, of some 16,000 tokens; the image depends on it.
    #[arg(long, value_name = "FILE")]
    calibration: Option<PathBuf>,
    /// Write the plan: one line a linear, with what each format is predicted to lose. Edit it, and pack with --plan.
    #[arg(long, value_name = "FILE")]
    write_plan: Option<PathBuf>,
    /// Write what was chosen, as JSON or as a page with charts (.json, .html); can be given twice.
    #[arg(long, value_name = "FILE", value_parser = report_path)]
    report: Vec<PathBuf>,
}

impl Widths {
    /// What the options ask for, if they ask for anything. Something else may be `calibrated`; the `head` may be free to be chosen for.
    fn adaptive(&self, calibrated: bool, head: bool) -> Result<Option<Adaptive>, Error> {
        let calibration = self.calibration.is_some() && !calibrated;
        let budget = self.average_bits.is_some() || self.max_size.is_some() || self.high.is_some();
        let rule = match (&self.plan_file, self.bits.as_deref()) {
            (Some(path), _) => Rule::Plan(path.clone()),
            (None, None) if budget || calibration || self.write_plan.is_some() || !self.report.is_empty() => {
                let what = "budgets, plans and reports go with --bits or --plan, calibration also with --sparsity and --live-ffn";
                return Err(Error::Options(what.into()));
            }
            (None, None) => return Ok(None),
            (None, Some("auto")) => match (self.average_bits, self.max_size, self.high.zip(self.low)) {
                (Some(bits), ..) => Rule::Average(bits),
                (_, Some(size), _) => Rule::Size(size),
                (.., Some((high, low))) => Rule::Thresholds { high, low },
                _ if self.calibration.is_some() => Rule::AsMuch(Format::I4G),
                _ => Rule::Fixed,
            },
            (None, Some(_)) if budget => {
                return Err(Error::Options("a budget or thresholds go with --bits auto".into()));
            }
            (None, Some("i2")) => Rule::Uniform(Format::I2G),
            (None, Some("i3")) => Rule::Uniform(Format::I3G),
            (None, Some("i4")) => Rule::Uniform(Format::I4G),
            (None, Some(_)) => Rule::Uniform(Format::I8),
        };
        let head = head && !matches!(rule, Rule::Uniform(_));
        Ok(Some(Adaptive { rule, text: self.calibration.clone(), head }))
    }

    /// Writes plan and reports.
    fn write(&self, report: &Report) -> Result<(), Error> {
        let Some(adapted) = &report.adapted else { return Ok(()) };
        let write = |path: &Path, text: String| {
            std::fs::write(path, text).map_err(|error| Error::Io { path: path.into(), doing: "write", error })
        };
        if let Some(path) = &self.write_plan {
            write(path, adapted.plan())?;
        }
        self.report.iter().try_for_each(|path| {
            let html = path.extension().is_some_and(|e| e == "html");
            write(path, if html { adapted.to_html(&report.name) } else { format!("{:#}\n", adapted.to_json()) })
        })
    }
}

fn average(text: &str) -> Result<f64, String> {
    let bits: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
    if (0.5..=16.0).contains(&bits) { Ok(bits) } else { Err("between 0.5 and 16".into()) }
}

fn bandwidth(text: &str) -> Result<f64, String> {
    let rate: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
    if (0.001..=1e6).contains(&rate) { Ok(rate) } else { Err("between 0.001 and 1000000".into()) }
}

fn size(text: &str) -> Result<u64, String> {
    let (digits, unit) = match text.as_bytes().last() {
        Some(b'K' | b'k') => (&text[..text.len() - 1], 1_000),
        Some(b'M' | b'm') => (&text[..text.len() - 1], 1_000_000),
        Some(b'G' | b'g') => (&text[..text.len() - 1], 1_000_000_000),
        _ => (text, 1),
    };
    let number: u64 = digits.parse().map_err(|_| "a number, with K, M or G behind it if need be".to_owned())?;
    number.checked_mul(unit).ok_or_else(|| "too large".to_owned())
}

fn report_path(text: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(text);
    let known = path.extension().is_some_and(|e| e == "json" || e == "html");
    if known { Ok(path) } else { Err("a name that ends in .json or .html".into()) }
}

#[derive(Args, Debug)]
struct Formats {
    /// Format of the ternary weights: tl takes 1.67 bits each (and 1, as b1, in linears that are written as they are
    /// multiplied and have no zeros but in rows and columns that are left out), t2 takes 2, b1 takes 1 (but no weight that is
    /// stored may be zero). Those that end in g128 have a scale for every 128 columns of a row.
    #[arg(long, default_value = "tl", value_parser = format(&["tl", "t2", "b1", "i4", "i8", "tlg128", "b1g128", "i4g128", "i3g128", "i2g128"]))]
    format: Format,
    /// Format of linears that are not ternary, in models that have such; the digit is the bits of a weight, and 3 and 2 cost
    /// much of a model's quality. f16 multiplies them with activations that are not quantized: large and slow, to see what
    /// quantizing costs. Those that are ternary but for a scale for every 128 columns become tlg128, or b1g128 if no
    /// weight is zero.
    #[arg(long, default_value = "i8", value_parser = format(&["i8", "i4", "f16", "i4g128", "i3g128", "i2g128"]))]
    dense: Format,
    /// Format of the head, which scores the tokens. two-stage has 8 bits in two planes, and reads the second for the few
    /// tokens only that can be the best: the same tokens from
    /// fewer bytes. Not shown to be faster; with --top-k 40 it was slower. Without this option it has i8, or with --bits auto and
    /// --plan the one that is chosen for it as for a linear.
    #[arg(long, value_parser = PossibleValuesParser::new(["i8", "i4", "f16", "i4g128", "i3g128", "i2g128", "tlg128", "b1g128", TWO_STAGE]))]
    head: Option<String>,
    /// Format of the embedding, in models where the head is not the embedding too [default: as the head, i8 for two-stage].
    #[arg(long, value_parser = format(&["i8", "i4", "f16", "i4g128", "i3g128", "i2g128", "tlg128", "b1g128"]))]
    embedding: Option<Format>,
    /// Store up and down in 2 bits so that a token reads only what its activations do not multiply by zero: worth it where
    /// the activation is a squared ReLU. With --calibration neurons that fire together in that text lie together, so that what
    /// is read lies in fewer pieces: the same logits but for the order in which the norm before down adds up.
    #[arg(long)]
    live_ffn: bool,
    /// Layout of linears of models that were pruned, where it saves a sixteenth or more: rowcol leaves rows and columns of zeros
    /// out of what is stored and read, 16x64 and 16x16 blocks of zeros of ternary linears; auto what saves most. Results are
    /// the same. whole stores every linear with its zeros.
    #[arg(long, default_value = "auto", value_parser = PossibleValuesParser::new(LAYOUTS.map(|(name, seen)| PossibleValue::new(name).hide(!seen))).try_map(|l| layouts(&l)))]
    layout: Layouts,
    /// The model's name in the image [default: the directory's].
    #[arg(long)]
    name: Option<String>,
}

/// What the memory plan in the image is for. `bitnet` can be told otherwise when it runs.
#[derive(Args, Debug)]
#[command(next_help_heading = "Memory plan (can be changed when the image runs)")]
struct PlanOptions {
    /// Positions a conversation can have [default: the model's, at most 4096].
    #[arg(long, value_name = "POSITIONS")]
    context: Option<u32>,
    /// Tokens of a prompt that share one pass over the weights, 1 to 16 [default: 8].
    #[arg(long, value_name = "TOKENS")]
    batch: Option<u32>,
    /// How keys and values are kept [default: f16].
    #[arg(long, value_parser = PossibleValuesParser::new(["f32", "f16", "i8"]).map(|kv| kv_format(&kv)))]
    kv: Option<KvFormat>,
}

/// Show what an image holds: model, memory, and every section. Reads the header only.
#[derive(Args, Debug)]
struct Inspect {
    /// The image.
    image: PathBuf,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// Check all of an image: header, lengths, padding, every checksum, every weight, every scale, the tokenizer.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  bitnet-pack verify 2b4t.bitnet
  bitnet-pack verify 2b4t.bitnet --public-key key.pub.pem")]
struct Verify {
    /// The image.
    image: PathBuf,
    /// Before all else, compare every byte with the signature IMAGE.sig by this key, in PEM.
    #[arg(long, value_name = "FILE")]
    public_key: Option<PathBuf>,
}

/// Make a pair of keys: one that signs images, and one by which others know your signatures.
///
/// `openssl genpkey -algorithm ed25519 -out key.pem` and `openssl pkey -in key.pem -pubout -out key.pub.pem` make the same.
#[derive(Args, Debug)]
#[command(after_help = "\
Example:
  bitnet-pack keygen -o key.pem")]
struct Keygen {
    /// Where the private key goes, readable by you alone; the public one goes to the same name with .pub.pem at its end. Nothing
    /// that is there already is replaced.
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
}

/// Sign an image: `bitnetd --require-signature` then takes it from you alone.
///
/// The image is verified first. The signature is 64 bytes of Ed25519 over the whole file, in IMAGE.sig, which goes where the image
/// goes; `openssl pkeyutl -verify -rawin -pubin -inkey key.pub.pem -in IMAGE -sigfile IMAGE.sig` checks it too.
#[derive(Args, Debug)]
#[command(after_help = "\
Example:
  bitnet-pack sign 2b4t.bitnet --key key.pem")]
struct Sign {
    /// The image.
    image: PathBuf,
    /// The private key: Ed25519, PKCS #8 in PEM, without a password.
    #[arg(long, value_name = "FILE")]
    key: PathBuf,
}

/// Say where two images differ: in the header, and in the weights of each section.
///
/// The exit code is 0 whether they differ or not.
#[derive(Args, Debug)]
struct Diff {
    /// One image.
    a: PathBuf,
    /// The other.
    b: PathBuf,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// Write an image as a GGUF file, for llama.cpp and its kin.
///
/// Ternary weights stay what they are, and packing the file again gives them back. Linears and heads of eight bits or fewer
/// become Q8_0 with the same integers. Tokenizers of sentencepiece's kind go with it. Which programs run a BitNet
/// architecture, and whether with the right activation, is for you to check: several do not.
#[derive(Args, Debug)]
#[command(after_help = "\
Example:
  bitnet-pack export stories.bitnet -o stories.gguf")]
struct Export {
    /// The image.
    image: PathBuf,
    /// The GGUF file to write; a GGUF file that is there already is replaced.
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Type of ternary linears: tq2_0 takes 2.06 bits a weight and is faster, tq1_0 takes 1.69.
    #[arg(long, default_value = "tq2_0", value_parser = ternary())]
    ternary: Ternary,
}

/// Give a checkpoint states of fixed size, to be trained: attention to a window with sinks, and a memory beside it.
///
/// Reads a checkpoint in Hugging Face's layout and writes another. --to-stateful: the same tensors, and in every layer those of a
/// memory of which nothing is added yet. Within the window the new model computes what the old one does, bit for
/// bit with keys in f32; beyond it conversations have no end and one size. tools/train trains the memories
/// (train.py --memory-only), for which the linears must be floats. --to-tbha: binary values in attention, queries and keys ternary as they are, all linears as floats that
/// are multiplied as they are; it saves little and costs quality. Written under a temporary name and checked before it is renamed.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  bitnet-pack convert ./stories --to-stateful -o ./stateful --window 64
  bitnet-pack convert ./stories --to-tbha --calibration text.txt -o ./tbha")]
#[command(group = clap::ArgGroup::new("becomes").required(true))]
struct Convert {
    /// The checkpoint: a directory with config.json and model.safetensors, or shards with their index.
    source: PathBuf,
    /// The directory to write; nothing may be there.
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// Conversations of one size.
    #[arg(long, group = "becomes")]
    to_stateful: bool,
    /// Ternary-binary hybrid attention.
    #[arg(long, group = "becomes", requires = "calibration", conflicts_with = "StateOptions")]
    to_tbha: bool,
    /// With --to-tbha: a text of the kind that the model will read, UTF-8.
    #[arg(long, value_name = "FILE", conflicts_with = "to_stateful")]
    calibration: Option<PathBuf>,
    /// With --to-tbha: the tokenizer [default: the one in the directory].
    #[arg(long, value_name = "FILE", conflicts_with = "to_stateful")]
    tokenizer: Option<PathBuf>,
    #[command(flatten)]
    state: StateOptions,
}

/// A state of fixed size for each conversation.
#[derive(Args, Debug)]
#[command(next_help_heading = "Conversations of one size")]
struct StateOptions {
    /// The last positions that attention sees.
    #[arg(long, value_name = "POSITIONS", default_value_t = 256)]
    window: u32,
    /// The first positions that attention sees for ever.
    #[arg(long, value_name = "POSITIONS", default_value_t = 4)]
    sinks: u32,
    /// A layer's memory.
    #[arg(long, value_enum, default_value = "matrices")]
    memory: MemoryKind,
    /// Matrices of a layer's memory [default: 4].
    #[arg(long)]
    heads: Option<u32>,
    /// Numbers of a key and of a value, whose product a matrix has; of a vector [default: 32; of a vector 256].
    #[arg(long, value_name = "NUMBERS")]
    width: Option<u32>,
    /// Give the memory a token when it leaves the window, and not at once: so that within the window the model computes what
    /// it did when the memory is trained, too.
    #[arg(long)]
    delay_writes: bool,
}

impl StateOptions {
    fn stateful(&self) -> Result<Stateful, Error> {
        let Self { window, sinks, memory, heads, width, delay_writes } = *self;
        let memory = match memory {
            MemoryKind::Matrices => {
                let (heads, width) = (heads.unwrap_or(4), width.unwrap_or(32));
                Memory::Matrices(Matrices { heads, key: width, value: width })
            }
            MemoryKind::Vector if heads.is_some() => {
                return Err(Error::Options("--heads are those of matrices; a vector has none".into()));
            }
            MemoryKind::Shared if heads.or(width).is_some() => {
                let what = "--heads and --width are those of a memory of its own; a shared one has attention's";
                return Err(Error::Options(what.into()));
            }
            MemoryKind::Shared => Memory::Shared,
            MemoryKind::Vector => Memory::Vector(Vector { width: width.unwrap_or(256) }),
        };
        Ok(Stateful { window: Window { positions: window, sinks }, memory, delayed_writes: delay_writes })
    }
}

/// What remembers what has left the window.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum MemoryKind {
    /// By a gated delta rule: what follows a key is recalled by it.
    Matrices,
    /// By a gated recurrence, number by number: far smaller, and it recalls that something was there, not what it belonged to.
    Vector,
    /// As matrices, one for each key head and as wide, by attention's own queries, keys and values: next to no weights.
    Shared,
}

/// Make an image of a known shape with random weights, to measure speed without a download.
///
/// Without --tokenizer use it with `bitnet bench`, `bitnet logits --ids`, or `bitnet run --ids 1,2,3 --print-ids`. Attention sees
/// everything and there is no memory, unless an option of conversations of one size is given.
#[derive(Args, Debug)]
#[command(after_help = "\
Presets:
  2b4t  BitNet b1.58 2B-4T
  3b    bitnet_b1_58-3B
  8b    Llama3-8B-1.58
  135m  SmolLM 135M
  small hidden 768, 12 layers, vocabulary 32000
  tiny  two layers, for tests

Examples:
  bitnet-pack dummy --preset 2b4t -o dummy.bitnet
  bitnet-pack dummy --preset 2b4t --tokenizer models/stories-ternary/tokenizer.json -o served.bitnet
  bitnet-pack dummy --preset 2b4t --memory matrices --width 64 -o endless.bitnet
  bitnet-pack dummy --preset 8b --layers 4 --format t2 -o small.bitnet")]
struct Dummy {
    /// The shape.
    #[arg(long, value_parser = preset())]
    preset: Preset,
    /// The image to write; an image that is there already is replaced.
    #[arg(short, long, value_name = "IMAGE")]
    output: PathBuf,
    /// Another number of layers.
    #[arg(long)]
    layers: Option<u32>,
    /// Another vocabulary.
    #[arg(long, value_name = "TOKENS")]
    vocab: Option<u32>,
    /// A tokenizer, which may have fewer tokens than the vocabulary: tokenizer.json, a sentencepiece model or a tiktoken file.
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,
    /// The same number gives the same image.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    #[command(flatten)]
    state: Option<StateOptions>,
    #[command(flatten)]
    formats: Formats,
    #[command(flatten)]
    plan: PlanOptions,
}

/// A head in two planes.
const TWO_STAGE: &str = "two-stage";

fn format(names: &'static [&'static str]) -> impl TypedValueParser<Value = Format> {
    let named = |name: String| Format::ALL.into_iter().find(|f| f.name() == name).expect("all are formats");
    PossibleValuesParser::new(names.iter().copied()).map(named)
}

/// The type that the option stands for, if it does not leave it open.
fn i2s_group(option: &str) -> Option<Dtype> {
    match option {
        "64" => Some(Dtype::I2_S_64),
        "128" => Some(Dtype::I2_S),
        _ => None,
    }
}

fn ternary() -> impl TypedValueParser<Value = Ternary> {
    PossibleValuesParser::new(["tq2_0", "tq1_0"]).map(|n| if n == "tq1_0" { Ternary::Five } else { Ternary::Two })
}

fn preset() -> impl TypedValueParser<Value = Preset> {
    let named = |name: String| Preset::ALL.into_iter().find(|(n, _)| *n == name).expect("all are presets").1;
    PossibleValuesParser::new(Preset::ALL.map(|(name, _)| name)).map(named)
}

fn target() -> impl TypedValueParser<Value = Target> {
    let named = |name: String| Target::ALL.into_iter().find(|(n, _)| *n == name).expect("all are targets").1;
    PossibleValuesParser::new(Target::ALL.map(|(name, _)| name)).map(named)
}

/// Names of layouts, and whether they are offered: people know the others from elsewhere, and are told why they are not here.
const LAYOUTS: [(&str, bool); 7] = [
    ("auto", true),
    ("rowcol", true),
    ("16x64", true),
    ("16x16", true),
    ("whole", true),
    ("csr", false),
    ("block-diagonal", false),
];

fn layouts(name: &str) -> Result<Layouts, &'static str> {
    Ok(match name {
        "rowcol" => Layouts::Kept,
        "whole" => Layouts::Whole,
        "csr" => {
            return Err(
                "lists of columns are slower than the whole ternary linear unless 2 % of its weights or fewer are not zero \
                        (docs/benchmarks.md); whole is what to use",
            );
        }
        "block-diagonal" => {
            return Err("such a linear is one whose live blocks are on the diagonal; use 16x64 or 16x16");
        }
        name => BlockShape::ALL.into_iter().find(|s| s.name() == name).map_or(Layouts::Auto, Layouts::Blocks),
    })
}

fn kv_format(name: &str) -> KvFormat {
    match name {
        "f32" => KvFormat::F32,
        "f16" => KvFormat::F16,
        _ => KvFormat::I8,
    }
}

fn options(formats: Formats, plan: PlanOptions) -> Options {
    let Formats { format, dense, head, embedding, live_ffn, layout, name } = formats;
    let PlanOptions { context, batch, kv } = plan;
    let split_head = head.as_deref() == Some(TWO_STAGE);
    let head = Format::ALL.into_iter().find(|f| head.as_deref() == Some(f.name())).unwrap_or(Format::I8);
    let rest = Options::default();
    Options { format, dense, head, split_head, embedding, live_ffn, layout, name, context, batch, kv, ..rest }
}

/// A bar on a terminal; elsewhere only the lines.
struct Bar {
    bar: ProgressBar,
    interrupted: Arc<AtomicBool>,
}

impl Bar {
    fn new() -> Self {
        let style = ProgressStyle::with_template("{bar:30} {percent:>3} %  {wide_msg}");
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::hidden());
        let bar = bar.with_style(style.expect("a valid template"));
        Self { bar, interrupted: Arc::default() }
    }
    /// From now on Ctrl-C ends in order, so that the temporary file is removed; a second one ends at once.
    fn listen(self) -> Self {
        for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
            // Without a handler the worst is a temporary file that stays.
            let _ = signal_hook::flag::register_conditional_default(signal, Arc::clone(&self.interrupted));
            let _ = signal_hook::flag::register(signal, Arc::clone(&self.interrupted));
        }
        self
    }
}

impl Progress for Bar {
    fn start(&mut self, bytes: u64) {
        self.bar.set_length(bytes);
        self.bar.reset();
        if io::stderr().is_terminal() {
            self.bar.set_draw_target(ProgressDrawTarget::stderr());
        }
    }
    fn say(&mut self, line: &str) {
        self.bar.suspend(|| {
            let _ = writeln!(io::stderr(), "{line}");
        });
    }
    fn section(&mut self, name: &str) {
        if !self.bar.is_hidden() {
            self.bar.set_message(name.to_owned());
        }
    }
    fn advance(&mut self, bytes: u64) {
        self.bar.inc(bytes);
    }
    fn cancelled(&self) -> bool {
        self.interrupted.load(Ordering::Relaxed)
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

fn run(command: Command) -> Result<String, Error> {
    match command {
        Command::Pack(pack) => {
            let Pack { source, output, bandwidth, lossy, tokenizer, i2s_group: groups, .. } = *pack;
            let Pack { dry_run, target_arch: target, formats, widths, sparsity, plan, .. } = *pack;
            let sparsity = sparsity.chosen(formats.layout, widths.calibration.as_ref())?;
            let reorder = widths.calibration.clone().filter(|_| formats.live_ffn);
            let adaptive = widths.adaptive(sparsity.is_some() || reorder.is_some(), formats.head.is_none())?;
            let i2s = i2s_group(&groups);
            let options =
                Options { tokenizer, i2s, target, adaptive, sparsity, reorder, lossy, ..options(formats, plan) };
            let Some(output) = output.filter(|_| !dry_run) else {
                let report = bitnet_pack::plan(&source, &options, &mut Bar::new().listen())?;
                return Ok(planned(&report, bandwidth));
            };
            let report = bitnet_pack::pack(&source, &output, &options, &mut Bar::new().listen())?;
            widths.write(&report)?;
            Ok(written(&report, &output))
        }
        Command::Verify(Verify { image, public_key }) => {
            let signed = public_key.map(|key| bitnet_pack::sign::check(&image, &key)).transpose()?;
            let signed = if signed.is_some() { ", signed" } else { "" };
            let verified = bitnet_pack::verify::verify_with(&image, &mut Bar::new().listen())?;
            let bitnet_pack::Verified { bytes, sections, weights } = verified;
            Ok(format!("{}: sound{signed} ({bytes} bytes, {sections} sections, {weights} weights)\n", image.display()))
        }
        Command::Keygen(Keygen { output }) => {
            let public = bitnet_pack::sign::keygen(&output)?;
            Ok(format!("written: {} (keep it to yourself)\nwritten: {}\n", output.display(), public.display()))
        }
        Command::Sign(Sign { image, key }) => {
            let signature = bitnet_pack::sign::sign(&image, &key, &mut Bar::new().listen())?;
            Ok(format!("written: {}\n", signature.display()))
        }
        Command::Inspect(Inspect { image, json }) => {
            let summary = bitnet_pack::inspect(&image)?;
            Ok(if json { format!("{:#}\n", summary.to_json()) } else { summary.to_string() })
        }
        Command::Diff(Diff { a, b, json }) => {
            let difference = bitnet_pack::diff(&a, &b)?;
            Ok(if json { format!("{:#}\n", difference.to_json()) } else { difference.to_string() })
        }
        Command::Export(Export { image, output, ternary }) => {
            let exported = bitnet_pack::export(&image, &output, ternary, &mut Bar::new().listen())?;
            Ok(format!("{exported}written: {}\n", output.display()))
        }
        Command::Convert(Convert { source, output, calibration: Some(text), tokenizer, .. }) => {
            let new = Hybrid { text, tokenizer };
            let converted = bitnet_pack::convert_values(&source, &output, &new, &mut Bar::new().listen())?;
            Ok(format!("{converted}written: {}\n", output.display()))
        }
        Command::Convert(Convert { source, output, state, .. }) => {
            let converted = bitnet_pack::convert(&source, &output, &state.stateful()?, &mut Bar::new().listen())?;
            Ok(format!("{converted}written: {}\n", output.display()))
        }
        Command::Dummy(Dummy { preset, output, layers, vocab, tokenizer, seed, state, formats, plan }) => {
            let mut shape = preset.shape();
            let config = &mut shape.config;
            config.layers = layers.unwrap_or(config.layers);
            config.vocab = vocab.unwrap_or(config.vocab);
            if let Some(state) = state {
                let Stateful { window, memory, delayed_writes } = state.stateful()?;
                (config.window, config.memory, config.delayed_writes) = (Some(window), Some(memory), delayed_writes);
            }
            // A benchmark may want more positions than the model was trained for.
            config.context = plan.context.unwrap_or(0).max(config.context);
            let options = Options { tokenizer, ..options(formats, plan) };
            let report = bitnet_pack::dummy(&output, &shape, &options, seed, &mut Bar::new().listen())?;
            Ok(written(&report, &output))
        }
    }
}

/// The report of what would be written.
fn planned(report: &Report, bandwidth: Option<f64>) -> String {
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let rate = bandwidth.map_or(String::new(), |bandwidth| {
        let (first, last) = report.decode_rate(bandwidth * 1e9);
        format!(
            "decode:  at most {first:.1} tokens/s at {bandwidth} GB/s, {last:.1} at the end of the context\n         \
             a token reads {:.1} MiB of weights, the last one {:.1} MiB of the conversation besides\n",
            mib(report.token_bytes()),
            mib(report.state_bytes()),
        )
    });
    format!("{report}{rate}packing: would take {:.1} MiB of memory\nnothing was written\n", mib(report.peak_bytes))
}

/// The report, whether the packer kept to its memory, and where the image lies.
fn written(report: &Report, output: &Path) -> String {
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let promised = mib(report.peak_bytes);
    let used = peak_rss().map_or("unknown".into(), |bytes| format!("{:.1} MiB", mib(bytes)));
    format!(
        "{report}checked: every section read back; bits a weight are those planned in all {} layers\n\
         packing: took {used} of memory at most, {promised:.1} MiB were promised\nwritten: {}\n",
        report.config.layers,
        output.display()
    )
}

/// The most memory this process has had at one time, where the system tells.
fn peak_rss() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// Writes all of it at once. A pipe that its reader has closed is no failure: whoever read it has seen enough.
fn print(text: &str) -> Result<(), io::Error> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error),
        _ => Ok(()),
    }
}

fn main() -> ExitCode {
    let result = run(Cli::parse().command).map_err(|e| e.to_string());
    match result.and_then(|text| print(&text).map_err(|e| format!("cannot write to standard output: {e}"))) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Standard error may be closed too, and there is nobody left to tell.
            let _ = writeln!(io::stderr(), "error: {error}");
            ExitCode::FAILURE
        }
    }
}
