//! Reader threads that are ahead of the computation.
//!
//! Readers fill buffers with the pieces that a pass will fetch next, in their order; the computation takes them from a
//! queue, works in one at a time and gives it back. Buffers change hands, so nothing is copied and nothing is shared. If the
//! computation asks for another piece than the next, the queue is dropped and the readers start over from there.
//!
//! Two readers keep the device busy while one of them is on its way from one read to the next: what io_uring with two reads in
//! flight gives as well, by code that would not be safe. `docs/streaming.md` has the figures.
use super::map::anonymous;
use super::pieces::{Piece, Pieces, is_apart};
use super::{BlockDevice, Extent, WeightSource};
use crate::error::SourceError;
use crate::image::{Image, Record, checksum};
use alloc::collections::VecDeque;
use alloc::sync::Arc;
use alloc::vec::Vec;
use bitnet_kernel::Block;
use core::ops::Range;
use core::time::Duration;
use memmap2::MmapMut;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;
use std::{io, thread};
use xxhash_rust::xxh3::Xxh3;
use zerocopy::{FromBytes, IntoBytes};

/// How to stream.
#[derive(Clone, Copy, Debug)]
pub struct RingOptions {
    /// Buffers, at least [`RingOptions::SLOTS_MIN`]: one that is computed from, one that is filled, and others between.
    pub slots: usize,
    /// How long a fetch waits for the device before it fails.
    pub patience: Duration,
    /// Whether each piece is compared with what it was when the image was opened, which reads the whole image once then.
    pub verify: bool,
    /// So many reads and waits are recorded for [`Watch::spans`], the first ones.
    pub spans: usize,
}

impl RingOptions {
    /// Fewer buffers do not overlap.
    pub const SLOTS_MIN: usize = 2;
}

/// What a ring has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingStats {
    /// Blocks that the reader read, rows by themselves and what was dropped included.
    pub blocks: u64,
    /// Blocks of pieces that were read and not used.
    pub dropped: u64,
    /// How long reads took, those of all readers one after another.
    pub reading: Duration,
    /// How long fetches waited for them.
    pub waiting: Duration,
}

/// One read, or one wait for it.
#[derive(Clone, Copy, Debug)]
pub struct Span {
    /// The reader that read, from 0; `None` is a wait of the computation.
    pub reader: Option<usize>,
    /// First block of the piece or row.
    pub start: u32,
    /// Blocks of it.
    pub blocks: u32,
    /// Since the ring was started.
    pub from: Duration,
    /// The same.
    pub to: Duration,
}

/// Memory for a piece, and where in it the piece begins.
#[derive(Debug)]
struct Buffer {
    memory: MmapMut,
    first: usize,
}

impl Buffer {
    /// For `blocks`, wherever they begin.
    fn new(blocks: u32, align: u32) -> io::Result<Self> {
        Ok(Self { memory: anonymous(buffer_bytes(blocks, align) as usize)?, first: 0 })
    }
    /// Reads `extent`, and what is around it up to multiples of the device's alignment.
    fn fill(&mut self, device: &mut dyn BlockDevice, extent: Extent, end: u32) -> Result<(), SourceError> {
        let align = device.align_blocks();
        let start = extent.start / align * align;
        let blocks = extent.end().next_multiple_of(align).min(end).max(extent.end()) - start;
        self.first = (extent.start - start) as usize;
        let memory = <[Block]>::mut_from_bytes(&mut self.memory[..blocks as usize * Block::BYTES]);
        device.read(start, memory.expect("pages are aligned"))
    }
    fn blocks(&self, from: usize, blocks: u32) -> &[Block] {
        let bytes = &self.memory[(self.first + from) * Block::BYTES..][..blocks as usize * Block::BYTES];
        <[Block]>::ref_from_bytes(bytes).expect("pages are aligned")
    }
}

/// Bytes of a buffer.
const fn buffer_bytes(blocks: u32, align: u32) -> u64 {
    let blocks = blocks as u64 + 2 * align as u64;
    (blocks * Block::BYTES as u64).next_multiple_of(4096)
}

/// A piece that is read or was.
#[derive(Debug)]
struct Slot {
    piece: usize,
    /// Which read it is, counted from the start.
    read: u64,
    /// The buffer and how it went, when it is over.
    done: Option<(Buffer, Result<(), SourceError>)>,
}

/// What the reader and the computation share.
#[derive(Debug)]
struct Queue {
    /// Pieces in the order in which their reads began. One that is not in it any more is not wanted when it comes.
    slots: VecDeque<Slot>,
    empty: Vec<Buffer>,
    /// Reads so far.
    reads: u64,
    /// The piece to read next.
    next: usize,
    /// The pieces that passes fetch, again and again.
    order: Range<usize>,
    /// A read failed: the readers wait for a fetch.
    halted: bool,
    row: Row,
    stopped: bool,
    stats: RingStats,
    spans: Vec<Span>,
}

/// A read that comes before all others.
#[derive(Debug)]
enum Row {
    /// None, and the computation has the buffer.
    None,
    Wanted(Extent, Buffer),
    Reading,
    Done(Extent, Buffer, Result<(), SourceError>),
}

impl Queue {
    /// The piece to read next, if any is to be read at all.
    fn upcoming(&self, pieces: &[Piece]) -> Option<usize> {
        let from = if self.order.contains(&self.next) { self.next } else { self.order.start };
        (from..self.order.end).chain(self.order.start..from).find(|&piece| pieces[piece].resident.is_none())
    }
    /// Passes fetch these pieces from now on: the next one begins.
    fn expect(&mut self, order: Range<usize>, pieces: &[Piece]) {
        // By the order until now: a reader that comes to it late would go on with what only the new one has at its end.
        if let Some(next) = self.upcoming(pieces) {
            self.next = next;
        }
        self.order = order;
    }
    /// The next piece to read, if there is one and a buffer for it: the piece, the number of the read, and the buffer.
    fn take_next(&mut self, pieces: &[Piece]) -> Option<(usize, u64, Buffer)> {
        if self.halted || self.empty.is_empty() {
            return None;
        }
        let piece = self.upcoming(pieces)?;
        self.next = piece + 1;
        let read = self.reads;
        self.reads += 1;
        self.slots.push_back(Slot { piece, read, done: None });
        Some((piece, read, self.empty.pop()?))
    }
    /// The buffer that `piece` was read into, if it was; has it read next if it is not under way.
    fn take_filled(&mut self, piece: usize, pieces: &Pieces) -> Option<Result<Buffer, SourceError>> {
        while let Some(first) = self.slots.front() {
            if first.piece == piece && first.done.is_none() {
                return None;
            }
            let Slot { piece: found, done, .. } = self.slots.pop_front()?;
            let Some((buffer, result)) = done else { continue };
            match result {
                Ok(()) if found == piece => return Some(Ok(buffer)),
                Ok(()) => self.stats.dropped += u64::from(pieces.all()[found].extent.blocks),
                // Until the next fetch: that one tries again.
                Err(e) if found == piece => {
                    self.empty.push(buffer);
                    return Some(Err(e));
                }
                Err(_) => {}
            }
            self.empty.push(buffer);
        }
        self.next = piece;
        self.halted = false;
        None
    }
    /// Takes what a read of `blocks` brought.
    fn deliver(&mut self, read: u64, buffer: Buffer, result: Result<(), SourceError>, blocks: u32) {
        if let Some(slot) = self.slots.iter_mut().find(|slot| slot.read == read) {
            self.halted |= result.is_err();
            slot.done = Some((buffer, result));
        } else {
            self.stats.dropped += u64::from(blocks);
            self.empty.push(buffer);
        }
    }
    fn record(&mut self, span: Span) {
        match span.reader {
            None => self.stats.waiting += span.to - span.from,
            Some(_) => {
                self.stats.reading += span.to - span.from;
                self.stats.blocks += u64::from(span.blocks);
            }
        }
        if self.spans.len() < self.spans.capacity() {
            self.spans.push(span);
        }
    }
}

#[derive(Debug)]
struct Shared {
    queue: Mutex<Queue>,
    changed: Condvar,
    pieces: Pieces,
    started: Instant,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
    /// Waits until `done` has something, no longer than `patience`.
    fn wait<T>(
        &self,
        Extent { start, blocks }: Extent,
        patience: Duration,
        done: &mut dyn FnMut(&mut Queue) -> Option<T>,
    ) -> Result<T, SourceError> {
        let mut queue = self.lock();
        let mut found = done(&mut queue);
        self.changed.notify_all();
        if let Some(found) = found {
            return Ok(found);
        }
        let from = self.started.elapsed();
        let mut to = from;
        while found.is_none() && to - from < patience {
            let left = patience - (to - from);
            queue = self.changed.wait_timeout(queue, left).unwrap_or_else(PoisonError::into_inner).0;
            found = done(&mut queue);
            to = self.started.elapsed();
        }
        queue.record(Span { reader: None, start, blocks, from, to });
        found.ok_or(SourceError::Timeout)
    }
}

/// Weights read from a device ahead of the computation, into a fixed ring of buffers.
///
/// If the device fails, is too slow, or gives other bytes than before, a fetch fails within [`RingOptions::patience`]. The
/// next fetch tries again.
#[derive(Debug)]
pub struct Ring {
    shared: Arc<Shared>,
    resident: MmapMut,
    /// The piece that is computed from.
    current: Option<(usize, Buffer)>,
    /// The buffer of rows, unless the reader has it.
    row: Option<Buffer>,
    patience: Duration,
}

impl Ring {
    /// Bytes of all the memory it takes with pieces and a device like these.
    pub fn bytes(pieces: &Pieces, slots: usize, align_blocks: u32) -> u64 {
        pieces.resident_blocks() * Block::BYTES as u64
            + slots as u64 * buffer_bytes(pieces.piece_blocks(), align_blocks)
            + buffer_bytes(pieces.row_blocks(), align_blocks)
    }

    /// Reads what is to be resident, and starts a reader for each of `devices`, which are one device, opened several times.
    ///
    /// # Errors
    /// If memory or a thread cannot be had, or the device fails; with [`RingOptions::verify`] also if a section's checksum
    /// disagrees.
    ///
    /// # Panics
    /// If there are fewer than [`RingOptions::SLOTS_MIN`] slots, or no device.
    pub fn start<D: BlockDevice + Send + 'static>(
        mut devices: Vec<D>,
        image: &Image<'_>,
        pieces: Pieces,
        options: RingOptions,
    ) -> io::Result<Self> {
        assert!(options.slots >= RingOptions::SLOTS_MIN, "a ring has at least {} slots", RingOptions::SLOTS_MIN);
        let device = devices.first_mut().expect("a ring has a device");
        let align = device.align_blocks();
        let buffer = || Buffer::new(pieces.piece_blocks(), align);
        let mut empty = (0..options.slots).map(|_| buffer()).collect::<io::Result<Vec<_>>>()?;
        let row = Some(Buffer::new(pieces.row_blocks(), align)?);
        let mut resident = anonymous(pieces.resident_blocks().max(1) as usize * Block::BYTES)?;
        let sums = load(device, image, &pieces, options.verify, (&mut empty[0], &mut resident));
        let sums = Arc::new(sums.map_err(io::Error::other)?);

        let queue = Queue {
            slots: VecDeque::with_capacity(options.slots),
            empty,
            reads: 0,
            next: 0,
            order: 0..pieces.all().len(),
            halted: false,
            row: Row::None,
            stopped: false,
            stats: RingStats::default(),
            spans: Vec::with_capacity(options.spans),
        };
        let (queue, changed, started) = (Mutex::new(queue), Condvar::new(), Instant::now());
        let shared = Arc::new(Shared { queue, changed, pieces, started });
        let ring = Self { shared, resident, current: None, row, patience: options.patience };
        for (number, device) in devices.into_iter().enumerate() {
            let reader = Reader { number, device, shared: Arc::clone(&ring.shared), sums: Arc::clone(&sums) };
            // It is never joined: nobody could wait for a device that does not answer.
            thread::Builder::new().name("reader".into()).spawn(|| reader.run())?;
        }
        Ok(ring)
    }

    /// What tells of it while a model has it.
    pub fn watch(&self) -> Watch {
        Watch(Arc::clone(&self.shared))
    }
    /// How long it takes to read the streamed pieces one after another, with nothing else to do: what reading ahead is to be
    /// compared with.
    ///
    /// # Errors
    /// If memory cannot be had or the device fails.
    pub fn read_alone(device: &mut dyn BlockDevice, pieces: &Pieces) -> io::Result<Duration> {
        let mut buffer = Buffer::new(pieces.piece_blocks(), device.align_blocks())?;
        let start = Instant::now();
        for piece in pieces.all().iter().filter(|p| p.resident.is_none()) {
            buffer.fill(device, piece.extent, pieces.image_blocks()).map_err(io::Error::other)?;
        }
        Ok(start.elapsed())
    }

    /// Lends `extent` from memory, if it is there.
    fn resident(&self, piece: Piece, extent: Extent) -> Option<&[Block]> {
        let at = (piece.resident? + extent.start - piece.extent.start) as usize * Block::BYTES;
        let bytes = &self.resident[at..][..extent.blocks as usize * Block::BYTES];
        Some(<[Block]>::ref_from_bytes(bytes).expect("pages are aligned"))
    }
    /// Reads `extent` before all else.
    fn read_row(&mut self, extent: Extent) -> Result<&[Block], SourceError> {
        let staging = self.shared.pieces.row_blocks();
        if extent.blocks > staging {
            return Err(SourceError::TooLarge { blocks: extent.blocks, staging });
        }
        let mut own = self.row.take();
        let (buffer, result) = self.shared.wait(extent, self.patience, &mut |queue| {
            let row = core::mem::replace(&mut queue.row, Row::Reading);
            queue.row = match (row, own.take()) {
                (Row::Done(done, buffer, result), _) if done == extent => {
                    queue.row = Row::None;
                    return Some((buffer, result));
                }
                (_, Some(buffer)) | (Row::Wanted(_, buffer) | Row::Done(_, buffer, _), None) => {
                    Row::Wanted(extent, buffer)
                }
                (row, None) => row,
            };
            None
        })?;
        let buffer = self.row.insert(buffer);
        result.map(|()| buffer.blocks(0, extent.blocks))
    }
}

/// Tells what a [`Ring`] does.
#[derive(Clone, Debug)]
pub struct Watch(Arc<Shared>);

impl Watch {
    /// The pieces it reads.
    pub fn pieces(&self) -> &Pieces {
        &self.0.pieces
    }
    /// What was read and waited for since the start.
    pub fn stats(&self) -> RingStats {
        self.0.lock().stats
    }
    /// Hands the first [`RingOptions::spans`] reads and waits to `each`, in the order in which they ended. The reader waits.
    pub fn spans(&self, each: &mut dyn FnMut(&Span)) {
        self.0.lock().spans.iter().for_each(each);
    }
}

impl WeightSource for Ring {
    fn fetch(&mut self, extent: Extent) -> Result<&[Block], SourceError> {
        let Some(i) = self.shared.pieces.find(extent) else { return self.read_row(extent) };
        let piece = self.shared.pieces.all()[i];
        if piece.resident.is_some() {
            return self.resident(piece, extent).ok_or(SourceError::Device);
        }
        if self.current.as_ref().is_none_or(|c| c.0 != i) {
            let mut given_back = self.current.take().map(|(_, buffer)| buffer);
            let buffer = self.shared.wait(piece.extent, self.patience, &mut |queue| {
                queue.empty.extend(given_back.take());
                queue.take_filled(i, &self.shared.pieces)
            })??;
            self.current = Some((i, buffer));
        }
        let (_, buffer) = self.current.as_ref().ok_or(SourceError::Device)?;
        Ok(buffer.blocks((extent.start - piece.extent.start) as usize, extent.blocks))
    }
    fn fetch_row(&mut self, extent: Extent) -> Result<&[Block], SourceError> {
        let at_hand = |i: &usize| {
            self.shared.pieces.all()[*i].resident.is_some() || self.current.as_ref().is_some_and(|c| c.0 == *i)
        };
        match self.shared.pieces.find(extent).filter(at_hand) {
            Some(_) => self.fetch(extent),
            None => self.read_row(extent),
        }
    }
    fn piece_blocks(&self) -> u32 {
        self.shared.pieces.piece_blocks()
    }
    fn piece_from(&self, start: u32) -> u32 {
        let pieces = &self.shared.pieces;
        let piece = pieces.find(Extent { start, blocks: 1 });
        piece.map_or(pieces.row_blocks(), |i| pieces.all()[i].extent.end() - start)
    }
    fn expect(&mut self, order: Extent) {
        let order = self.shared.pieces.range(order);
        let mut queue = self.shared.lock();
        if queue.order != order {
            queue.expect(order, self.shared.pieces.all());
            self.shared.changed.notify_all();
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        self.shared.lock().stopped = true;
        self.shared.changed.notify_all();
    }
}

/// Reads resident pieces into their memory; to verify, reads the whole image, compares sections with their checksums, and returns
/// those of the pieces.
fn load(
    device: &mut dyn BlockDevice,
    image: &Image<'_>,
    pieces: &Pieces,
    verify: bool,
    (buffer, resident): (&mut Buffer, &mut MmapMut),
) -> Result<Option<Vec<u64>>, SourceError> {
    let records = image.sections().records();
    let mut sums = Vec::new();
    let mut hash = Xxh3::new();
    for piece in pieces.all().iter().filter(|p| verify || p.resident.is_some()) {
        let Extent { start, blocks } = piece.extent;
        buffer.fill(device, piece.extent, pieces.image_blocks())?;
        let bytes = buffer.blocks(0, blocks).as_bytes();
        if let Some(at) = piece.resident {
            resident[at as usize * Block::BYTES..][..bytes.len()].copy_from_slice(bytes);
        }
        if !verify {
            continue;
        }
        sums.push(checksum(bytes));
        let mut at = start;
        while at < piece.extent.end() {
            let record = &records[records.partition_point(|r| r.start.get() <= at) - 1];
            let end = record.extent().end().min(piece.extent.end());
            hash.update(&bytes[(at - start) as usize * Block::BYTES..(end - start) as usize * Block::BYTES]);
            if end == record.extent().end() {
                compare(&hash, record)?;
                hash.reset();
            }
            at = end;
        }
    }
    for record in records.iter().filter(|r| verify && is_apart(r)) {
        hash.reset();
        let (mut start, end) = (record.start.get(), record.extent().end());
        while start < end {
            let blocks = pieces.piece_blocks().min(end - start);
            buffer.fill(device, Extent { start, blocks }, pieces.image_blocks())?;
            hash.update(buffer.blocks(0, blocks).as_bytes());
            start += blocks;
        }
        compare(&hash, record)?;
    }
    Ok(verify.then_some(sums))
}

fn compare(hash: &Xxh3, record: &Record) -> Result<(), SourceError> {
    let start = record.start.get();
    if hash.digest() == record.checksum.get() { Ok(()) } else { Err(SourceError::Checksum { start }) }
}

/// What runs on a reader's thread.
struct Reader<D> {
    number: usize,
    device: D,
    shared: Arc<Shared>,
    /// What the pieces were when the image was opened.
    sums: Arc<Option<Vec<u64>>>,
}

impl<D: BlockDevice> Reader<D> {
    fn run(mut self) {
        let shared = Arc::clone(&self.shared);
        let end = shared.pieces.image_blocks();
        let mut queue = shared.lock();
        while !queue.stopped {
            if let Row::Wanted(..) = queue.row
                && let Row::Wanted(extent, mut buffer) = core::mem::replace(&mut queue.row, Row::Reading)
            {
                drop(queue);
                let (result, span) = self.timed(extent, |device| buffer.fill(device, extent, end));
                queue = shared.lock();
                queue.record(span);
                queue.row = Row::Done(extent, buffer, result);
            } else if let Some((piece, read, mut buffer)) = queue.take_next(shared.pieces.all()) {
                let extent = shared.pieces.all()[piece].extent;
                drop(queue);
                let (mut result, span) = self.timed(extent, |device| buffer.fill(device, extent, end));
                if let Some(sums) = self.sums.as_ref().as_ref().filter(|_| result.is_ok())
                    && checksum(buffer.blocks(0, extent.blocks).as_bytes()) != sums[piece]
                {
                    result = Err(SourceError::Checksum { start: extent.start });
                }
                queue = shared.lock();
                queue.record(span);
                queue.deliver(read, buffer, result, extent.blocks);
            } else {
                queue = shared.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            shared.changed.notify_all();
        }
    }
    fn timed<R>(&mut self, extent: Extent, read: impl FnOnce(&mut dyn BlockDevice) -> R) -> (R, Span) {
        let from = self.shared.started.elapsed();
        let result = read(&mut self.device);
        let Extent { start, blocks } = extent;
        (result, Span { reader: Some(self.number), start, blocks, from, to: self.shared.started.elapsed() })
    }
}
