//! A conversation in bytes: kept for another day, or for another conversation that starts with the same words.
//!
//! | bytes | what |
//! |---|---|
//! | 0-7 | magic |
//! | 8-11 | version, 1 |
//! | 12-15 | how keys and values are kept: 0: f32, 1: f16, 2: int8 |
//! | 16-23 | [`Image::id`] |
//! | 24-31 | tokens |
//! | 32-39 | with a window, the first position after the sinks that is kept; else 0 |
//! | 40-47 | checksum of what follows the first 64 bytes |
//! | 48-55 | checksum of the 48 bytes before |
//! | 56-63 | zeros |
//!
//! Then, little-endian, for every layer and head the key of each position that is kept, with int8 followed by its scale; the values
//! in the same way; of a memory the matrices or the vector of every layer, then its last inputs, then of each layer
//! what it is given late, the oldest token first. Where a ring begins is left out, so that a
//! state with a shorter or longer one reads it too.
use super::State;
use crate::error::Error;
use crate::image::{Image, checksum};
use crate::memory::{KvFormat, Limits, write_len, written_with};
use core::ops::Range;
use zerocopy::IntoBytes;

const MAGIC: [u8; 8] = *b"\x89BITSTA\n";
const VERSION: u32 = 1;
const PREFIX: usize = 64;

impl State<'_> {
    /// Bytes of a snapshot of this conversation as it is now.
    pub fn snapshot_len(&self) -> usize {
        PREFIX + self.payload_len(self.position, self.oldest)
    }

    /// Writes a snapshot to the first [`State::snapshot_len`] bytes of `into`. `image` is the model's.
    ///
    /// # Panics
    /// If it does not fit.
    pub fn save(&self, image: &Image<'_>, into: &mut [u8]) {
        let (prefix, payload) = into[..self.snapshot_len()].split_at_mut(PREFIX);
        let mut left = &mut payload[..];
        let mut put = |bytes: &[u8]| {
            let (to, rest) = core::mem::take(&mut left).split_at_mut(bytes.len());
            to.copy_from_slice(bytes);
            left = rest;
        };
        for store in [&self.keys, &self.values] {
            for head in 0..store.heads() {
                for position in self.kept(self.position, self.oldest) {
                    let (row, scale) = store.bytes(head, self.slot(position));
                    put(row);
                    put(scale.as_bytes());
                }
            }
        }
        put(self.memory[self.now].numbers.as_bytes());
        put(self.memory[self.now].past.as_bytes());
        for layer in 0..self.config.layers as usize {
            self.waiting(self.position).for_each(|position| put(self.waiting.get(layer, position).as_bytes()));
        }
        debug_assert!(left.is_empty(), "the length is that of what is written");

        prefix.fill(0);
        prefix[..8].copy_from_slice(&MAGIC);
        prefix[8..12].copy_from_slice(&VERSION.to_le_bytes());
        prefix[12..16].copy_from_slice(&(self.limits.kv as u32).to_le_bytes());
        let numbers = [image.id(), self.position as u64, self.oldest as u64, checksum(payload)];
        prefix[16..48].copy_from_slice(numbers.map(u64::to_le_bytes).as_flattened());
        let sum = checksum(&prefix[..48]);
        prefix[48..56].copy_from_slice(&sum.to_le_bytes());
    }

    /// Makes this conversation the one of a snapshot. `image` is the model's.
    ///
    /// # Errors
    /// [`Error::Snapshot`] names what is wrong with it, and the conversation is what it was.
    pub fn restore(&mut self, image: &Image<'_>, snapshot: &[u8]) -> Result<(), Error> {
        let equal = |what, expected: u64, found: u64| {
            if expected == found { Ok(()) } else { Err(Error::Snapshot { what, expected, found }) }
        };
        let length = |expected: usize| equal("length", expected as u64, snapshot.len() as u64);
        let Some((prefix, payload)) = snapshot.split_first_chunk::<PREFIX>() else { return length(PREFIX) };
        let u32_at =
            |at: usize| u64::from(u32::from_le_bytes([prefix[at], prefix[at + 1], prefix[at + 2], prefix[at + 3]]));
        let u64_at = |at: usize| u32_at(at) | u32_at(at + 4) << 32;
        equal("start", u64::from_le_bytes(MAGIC), u64_at(0))?;
        equal("version", VERSION.into(), u32_at(8))?;
        equal("checksum of the head", checksum(&prefix[..48]), u64_at(48))?;
        equal("end of the head", 0, u64_at(56))?;
        equal("format of keys and values", self.limits.kv as u64, u32_at(12))?;
        equal("image", image.id(), u64_at(16))?;
        let number = |at: usize| usize::try_from(u64_at(at)).unwrap_or(usize::MAX);
        let (position, oldest) = (number(24), number(32));
        equal("number of tokens", position.min(self.position + self.remaining()) as u64, u64_at(24))?;
        let (least, most) = match self.config.window {
            // What a batch of any size leaves in a ring, and no less than what the next token sees.
            Some(window) => {
                let ring = window.positions as usize + Limits::BATCH_MAX as usize - 1;
                let sinks = window.sinks as usize;
                (position.saturating_sub(ring).max(sinks), self.first_seen(position))
            }
            None => (0, 0),
        };
        equal("first position", oldest.clamp(least, most) as u64, u64_at(32))?;
        length(PREFIX + self.payload_len(position, oldest))?;
        equal("checksum", checksum(payload), u64_at(40))?;

        let mut left = payload;
        let mut take = |to: &mut [u8]| {
            let (bytes, rest) = left.split_at(to.len());
            to.copy_from_slice(bytes);
            left = rest;
        };
        // In the order of positions: a ring that is shorter ends with the last of them, as if it had been there from the start.
        for store in 0..2 {
            for head in 0..self.keys.heads() {
                for position in self.kept(position, oldest) {
                    let slot = self.slot(position);
                    let store = if store == 0 { &mut self.keys } else { &mut self.values };
                    let (row, scale) = store.bytes_mut(head, slot);
                    take(row);
                    take(scale.as_mut_bytes());
                }
            }
        }
        let now = &mut self.memory[self.now];
        take(now.numbers.as_mut_bytes());
        take(now.past.as_mut_bytes());
        for layer in 0..self.config.layers as usize {
            self.waiting(position).for_each(|position| take(self.waiting.get_mut(layer, position).as_mut_bytes()));
        }
        self.oldest = oldest.max(self.oldest_after(position));
        (self.position, self.before) = (position, None);
        Ok(())
    }

    /// Makes this conversation the same as another.
    ///
    /// # Errors
    /// [`Error::State`] if that is of a model of another shape or has other limits. Whose weights it has read is not known here, unlike
    /// in a snapshot.
    pub fn fork_from(&mut self, other: &State<'_>) -> Result<(), Error> {
        if self.config != other.config || self.limits != other.limits {
            return Err(Error::State);
        }
        for (to, from) in [(&mut self.keys, &other.keys), (&mut self.values, &other.values)] {
            for head in 0..from.heads() {
                for position in other.kept(other.position, other.oldest) {
                    let slot = other.slot(position);
                    let ((row, scale), (from_row, from_scale)) = (to.bytes_mut(head, slot), from.bytes(head, slot));
                    row.copy_from_slice(from_row);
                    scale.copy_from_slice(from_scale);
                }
            }
        }
        let (to, from) = (&mut self.memory[self.now], &other.memory[other.now]);
        to.numbers.copy_from_slice(from.numbers);
        to.past.copy_from_slice(from.past);
        for layer in 0..self.config.layers as usize {
            for position in other.waiting(other.position) {
                self.waiting.get_mut(layer, position).copy_from_slice(other.waiting.get(layer, position));
            }
        }
        (self.position, self.oldest, self.before) = (other.position, other.oldest, None);
        Ok(())
    }

    /// The positions that are kept of `position` tokens, the first after the sinks being `oldest`.
    pub(super) fn kept(&self, position: usize, oldest: usize) -> impl Iterator<Item = usize> + use<> {
        let sinks = self.config.window.map_or(0, |window| window.sinks as usize);
        (0..sinks.min(position)).chain(oldest..position)
    }

    /// The positions of `position` tokens that a memory is still to be given.
    pub(super) fn waiting(&self, position: usize) -> Range<usize> {
        let sinks = self.config.window.map_or(0, |window| window.sinks as usize);
        written_with(&self.config, position).unwrap_or(sinks.min(position))..position
    }

    /// Bytes after the head of a snapshot.
    fn payload_len(&self, position: usize, oldest: usize) -> usize {
        let scale = if self.limits.kv == KvFormat::I8 { size_of::<f32>() } else { 0 };
        let row = self.config.head_dim as usize * self.limits.kv.bytes() + scale;
        let memory = &self.memory[self.now];
        let rows = self.kept(position, oldest).count();
        let waiting = self.waiting(position).len() * write_len(&self.config);
        let floats = memory.numbers.len() + memory.past.len() + self.config.layers as usize * waiting;
        2 * self.keys.heads() * rows * row + size_of::<f32>() * floats
    }
}
