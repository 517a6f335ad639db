//! Options of the sampler and of where a reply ends.
use bitnet_kernel::Block;
use bitnet_runtime::generate::Session;
use bitnet_runtime::sampler::{Sampler, Sampling};
use bitnet_runtime::{Error, Model, State};

/// How tokens are chosen, and when to stop.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct SamplingArgs {
    /// 0 always takes the best token; higher is more varied.
    #[arg(long, default_value_t = 0.8, value_parser = at_least_zero)]
    pub temperature: f32,
    /// Choose among the best so many tokens; 0: all.
    #[arg(long, default_value_t = 40)]
    pub top_k: u32,
    /// Choose among the fewest best tokens that together have this probability; 1: all.
    #[arg(long, default_value_t = 0.95, value_parser = fraction)]
    pub top_p: f32,
    /// Choose among tokens at least this fraction as probable as the best; 0: all.
    #[arg(long, default_value_t = 0.0, value_parser = fraction)]
    pub min_p: f32,
    /// Make tokens that occurred less likely; 1: do not.
    #[arg(long, default_value_t = 1.0, value_parser = positive)]
    pub repetition_penalty: f32,
    /// The same seed gives the same text.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// At most so many tokens in a reply.
    #[arg(long, short = 'n', default_value_t = 256)]
    pub max_tokens: usize,
    /// End before this text; may be given several times.
    #[arg(long = "stop", value_name = "TEXT", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    pub stops: Vec<String>,
    /// Guess tokens from what followed the same words before, and check up to 8 in one pass: the same text, sooner where it
    /// repeats itself or its prompt. Needs a --batch of at least 2.
    #[arg(long)]
    pub lookup: bool,
}

impl SamplingArgs {
    /// A conversation whose tokens are chosen so.
    pub(crate) fn session<'m>(
        &self,
        model: Model<'m>,
        state: State<'m>,
        memory: &'m mut [Block],
    ) -> Result<Session<'m>, Error> {
        let sampler = Sampler::new(model.config().vocab, self.sampling(), memory)?;
        let session = Session::new(model, state, sampler);
        Ok(if self.lookup { session.with_lookup() } else { session })
    }
    const fn sampling(&self) -> Sampling {
        Sampling {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            seed: self.seed,
        }
    }
}

fn number(text: &str, what: &str, ok: impl Fn(f32) -> bool) -> Result<f32, String> {
    text.parse().ok().filter(|&v: &f32| v.is_finite() && ok(v)).ok_or_else(|| format!("expected a number {what}"))
}

fn at_least_zero(text: &str) -> Result<f32, String> {
    number(text, "of at least 0", |v| v >= 0.0)
}

fn positive(text: &str) -> Result<f32, String> {
    number(text, "above 0", |v| v > 0.0)
}

fn fraction(text: &str) -> Result<f32, String> {
    number(text, "from 0 to 1", |v| (0.0..=1.0).contains(&v))
}
