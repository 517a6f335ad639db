//! How many conversations the memory has room for, and what they take beside the first, which is part of every model's plan.
use crate::config::Settings;
use bitnet_host::open::{ModelArgs, with_image};
use bitnet_host::weights::available;
use bitnet_kernel::Block;
use bitnet_runtime::Plan;

/// Conversations, unless the options say how many.
const SESSIONS: u8 = 4;

/// Bytes of one conversation more.
const fn each(plan: &Plan) -> u64 {
    ((plan.state + plan.sampler) * Block::BYTES) as u64
}

/// As many conversations as there is room for beside the weights, or, where weights are streamed since there is little, in half of
/// the memory: at least one, and four at most.
pub(crate) fn sessions(model: &ModelArgs) -> u8 {
    let fitting = with_image(model, |image, _, plan| {
        let have = model.weights.ram.unwrap_or_else(available);
        let left = have.saturating_sub(image.file_bytes()).max(have / 2);
        Ok(fitting(left, plan.bytes(), each(&plan)))
    });
    // What is wrong with the image is told when it is loaded.
    fitting.unwrap_or(SESSIONS)
}

fn fitting(left: u64, first: u64, each: u64) -> u8 {
    let more = left.saturating_sub(first) / each.max(1);
    (1 + more).min(SESSIONS.into()) as u8
}

/// The same options with room left for what the daemon has beside one conversation.
pub(crate) fn with_reserve(settings: &Settings) -> anyhow::Result<ModelArgs> {
    let mut model = settings.model.clone();
    let others = with_image(&model, |_, _, plan| Ok((u64::from(settings.sessions) - 1) * each(&plan)))?;
    model.weights.reserve = others + settings.serve.prompt_cache.unwrap_or(0);
    Ok(model)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conversations_share_what_is_left() {
        for (left, expected) in [(0, 1), (100, 1), (149, 1), (150, 2), (249, 3), (250, 4), (u64::MAX, 4)] {
            assert_eq!(fitting(left, 100, 50), expected, "{left}");
        }
        assert_eq!(fitting(100, 10, 0), 4);
    }
}
