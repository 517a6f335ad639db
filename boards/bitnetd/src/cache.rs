//! What conversations had read, kept beyond the conversation: snapshots, the longest common prefix of which a prompt need not read.
//!
//! Keys and values can be cut anywhere, so one snapshot serves every prompt that starts as it does. What a memory beside attention,
//! or a window, has read cannot be unread: such a snapshot serves prompts that go on where it ends, and snapshots are made where
//! that is likely, see `engine`.
use bitnet_runtime::{Image, State};

/// A prefix shorter than this is not worth keeping, nor giving up a conversation for that someone may continue.
pub(crate) const WORTH: usize = 16;

/// Whether what models of some kind have read can be cut anywhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cut {
    Anywhere,
    Nowhere,
}

impl Cut {
    /// How many tokens of `prompt` need not be read by a conversation that has read `tokens`. The last token is always read: its
    /// logits choose the next.
    pub(crate) fn usable(self, tokens: &[u32], prompt: &[u32]) -> usize {
        let common = common(tokens, prompt).min(prompt.len().saturating_sub(1));
        if self == Self::Anywhere || common == tokens.len() { common } else { 0 }
    }
}

/// Tokens that two conversations begin with.
pub(crate) fn common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

/// Snapshots, of at most so many bytes together; the one that was not used for longest goes first.
#[derive(Debug)]
pub(crate) struct Cache {
    cut: Cut,
    most: usize,
    bytes: usize,
    /// In the order of their use.
    entries: Vec<Entry>,
}

#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) tokens: Vec<u32>,
    pub(crate) snapshot: Vec<u8>,
}

impl Entry {
    const fn bytes(&self) -> usize {
        self.snapshot.len() + self.tokens.len() * size_of::<u32>()
    }
}

impl Cache {
    pub(crate) const fn new(cut: Cut, most: usize) -> Self {
        Self { cut, most, bytes: 0, entries: Vec::new() }
    }
    pub(crate) const fn bytes(&self) -> usize {
        self.bytes
    }
    /// What every snapshot has read.
    pub(crate) fn histories(&self) -> impl Iterator<Item = &[u32]> {
        self.entries.iter().map(|entry| &*entry.tokens)
    }
    /// The snapshot that saves `prompt` the most reading, if it is worth it, and how many tokens that are; it counts as used.
    pub(crate) fn find(&mut self, prompt: &[u32]) -> Option<(usize, &Entry)> {
        let usable = |i: usize| self.cut.usable(&self.entries[i].tokens, prompt);
        let best = (0..self.entries.len()).max_by_key(|&i| usable(i)).filter(|&i| usable(i) >= WORTH)?;
        let usable = usable(best);
        let entry = self.entries.remove(best);
        self.entries.push(entry);
        self.entries.last().map(|entry| (usable, entry))
    }
    /// Keeps what a conversation has read, unless it is too short, too large, or there already.
    pub(crate) fn keep(&mut self, tokens: &[u32], state: &State<'_>, image: &Image<'_>) {
        let len = state.snapshot_len();
        let bytes = len + size_of_val(tokens);
        let there = |entry: &Entry| match self.cut {
            Cut::Anywhere => entry.tokens.starts_with(tokens),
            Cut::Nowhere => entry.tokens == tokens,
        };
        if tokens.len() < WORTH || bytes > self.most || self.entries.iter().any(there) {
            return;
        }
        if self.cut == Cut::Anywhere {
            self.remove(|entry| tokens.starts_with(&entry.tokens));
        }
        while self.bytes + bytes > self.most {
            let oldest = self.entries.remove(0);
            self.bytes -= oldest.bytes();
        }
        let mut snapshot = vec![0; len];
        state.save(image, &mut snapshot);
        self.entries.push(Entry { tokens: tokens.to_vec(), snapshot });
        self.bytes += bytes;
    }
    fn remove(&mut self, which: impl Fn(&Entry) -> bool) {
        self.entries.retain(|entry| {
            let gone = which(entry);
            if gone {
                self.bytes -= entry.bytes();
            }
            !gone
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache(cut: Cut, entries: &[&[u32]]) -> Cache {
        let entry = |tokens: &&[u32]| Entry { tokens: tokens.to_vec(), snapshot: Vec::new() };
        Cache { cut, most: 0, bytes: 0, entries: entries.iter().map(entry).collect() }
    }

    #[test]
    fn the_longest_usable_prefix_wins() {
        let long: Vec<u32> = (0..40).collect();
        let other: Vec<u32> = (0..20).chain(90..110).collect();
        let prompt: Vec<u32> = (0..30).collect();
        let mut anywhere = cache(Cut::Anywhere, &[&long, &other]);
        // The last token of the prompt is read again, though it is there.
        assert_eq!(anywhere.find(&prompt).map(|(n, entry)| (n, &*entry.tokens)), Some((29, &*long)));
        assert!(anywhere.find(&prompt[..WORTH]).is_none(), "too short to be worth it");
        assert!(anywhere.find(&[7; 50]).is_none());
        let mut nowhere = cache(Cut::Nowhere, &[&long, &other, &prompt[..18]]);
        assert_eq!(nowhere.find(&prompt).map(|(n, _)| n), Some(18));
        assert!(nowhere.find(&prompt[..18]).is_none(), "nothing of it can be unread");
    }

    #[test]
    fn what_is_used_stays() {
        let (a, b): (Vec<u32>, Vec<u32>) = ((0..20).collect(), (50..70).collect());
        let mut cache = cache(Cut::Anywhere, &[&a, &b]);
        cache.find(&a).unwrap();
        assert_eq!(cache.histories().collect::<Vec<_>>(), [&b, &a]);
    }
}
