//! Weights from the drivers of embedded devices: any range of blocks from sectors of any size, errors of a driver, and a whole
//! model by way of each.
use bitnet_kernel::Block;
use bitnet_pack::{Options, Preset};
use bitnet_runtime::error::SourceError;
use bitnet_runtime::parallel::Serial;
use bitnet_runtime::source::{
    BlockDevice, Card, Flash, Mapped, Pieces, Ring, RingOptions, SectorDevice, Sectors, Streamed, WeightSource,
};
use bitnet_runtime::{Error, Limits, Model, Plan, State, backend};
use bitnet_tests::images::{Packed, fingerprint};
use embedded_sdmmc_types::blockdevice::{Block as CardBlock, BlockCount, BlockDevice as CardDevice, BlockIdx};
use embedded_storage::nor_flash::{ErrorType, NorFlashErrorKind, ReadNorFlash, check_read};
use std::cell::Cell;
use std::time::Duration;
use zerocopy::IntoBytes;

/// Flash in memory that reads units of `UNIT` bytes, and fails at one read, having filled half.
struct Chip<const UNIT: usize> {
    bytes: Vec<u8>,
    /// Reads until one fails.
    fails: Option<u64>,
}

impl<const UNIT: usize> ErrorType for Chip<UNIT> {
    type Error = NorFlashErrorKind;
}

impl<const UNIT: usize> ReadNorFlash for Chip<UNIT> {
    const READ_SIZE: usize = UNIT;

    fn read(&mut self, offset: u32, into: &mut [u8]) -> Result<(), NorFlashErrorKind> {
        check_read(self, offset, into.len())?;
        let from = &self.bytes[offset as usize..][..into.len()];
        if is_due(&mut self.fails) {
            into[..from.len() / 2].copy_from_slice(&from[..from.len() / 2]);
            return Err(NorFlashErrorKind::Other);
        }
        into.copy_from_slice(from);
        Ok(())
    }
    fn capacity(&self) -> usize {
        self.bytes.len()
    }
}

/// A card in memory that fails at one read.
#[derive(Debug)]
struct CardInMemory {
    bytes: Vec<u8>,
    fails: Cell<Option<u64>>,
    /// Sectors of the longest read.
    longest: Cell<usize>,
    tells_its_size: bool,
}

impl CardInMemory {
    fn new(bytes: Vec<u8>) -> Self {
        Self { bytes, fails: Cell::new(None), longest: Cell::new(0), tells_its_size: true }
    }
}

#[derive(Debug)]
struct CardError;

impl std::fmt::Display for CardError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("no answer")
    }
}

impl std::error::Error for CardError {}

impl CardDevice for &CardInMemory {
    type Error = CardError;

    fn read(&self, blocks: &mut [CardBlock], BlockIdx(first): BlockIdx) -> Result<(), CardError> {
        self.longest.set(self.longest.get().max(blocks.len()));
        let mut fails = self.fails.get();
        let due = is_due(&mut fails);
        self.fails.set(fails);
        if due {
            return Err(CardError);
        }
        let from = &self.bytes[first as usize * CardBlock::LEN..];
        for (to, from) in blocks.iter_mut().zip(from.as_chunks().0) {
            to.contents = *from;
        }
        Ok(())
    }
    fn write(&self, _: &[CardBlock], _: BlockIdx) -> Result<(), CardError> {
        panic!("an image is read");
    }
    fn num_blocks(&self) -> Result<BlockCount, CardError> {
        let count = BlockCount((self.bytes.len() / CardBlock::LEN) as u32);
        if self.tells_its_size { Ok(count) } else { Err(CardError) }
    }
}

/// Counts down to the read that fails.
fn is_due(fails: &mut Option<u64>) -> bool {
    let due = *fails == Some(0);
    *fails = fails.and_then(|left| left.checked_sub(1));
    due
}

/// Bytes that differ from their neighbours and from those a sector away.
fn pattern(len: usize) -> Vec<u8> {
    (0..len as u64).map(|i| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect()
}

/// Reads every range of blocks that begins or ends within two sectors of either end, from an image that begins with sector 1.
fn every_range<D: SectorDevice>(device: D, medium: &[u8]) {
    let image = &medium[D::SECTOR_BYTES..];
    let mut device = Sectors::new(device, 1);
    assert_eq!(device.bytes(), image.len() as u64, "sectors of {}", D::SECTOR_BYTES);
    let blocks = image.len() / Block::BYTES;
    let sector = device.align_blocks() as usize;
    let near = |at: usize| at <= 2 * sector || at + 2 * sector >= blocks;
    for start in (0..=blocks).filter(|&at| near(at)) {
        for end in (start..=blocks).filter(|&at| near(at)) {
            let mut into = vec![Block::ZERO; end - start];
            device.read(start as u32, &mut into).unwrap();
            let expected = &image[start * Block::BYTES..end * Block::BYTES];
            assert!(into.as_bytes() == expected, "sectors of {}: {start} to {end}", D::SECTOR_BYTES);
        }
    }
    for (start, len) in [(blocks as u32, 1), (0, blocks + 1), (blocks as u32 - 1, 2), (u32::MAX, 1)] {
        let mut into = vec![Block::ZERO; len];
        let out_of_range = SourceError::OutOfRange { start, blocks: len as u32 };
        assert_eq!(device.read(start, &mut into), Err(out_of_range));
    }
}

#[test]
fn every_range_of_blocks_is_read_from_sectors_of_every_size() {
    fn chip<const UNIT: usize>() {
        let bytes = pattern(6 * UNIT.max(64) + UNIT);
        every_range(Flash::new(Chip::<UNIT> { bytes: bytes.clone(), fails: None }), &bytes);
    }
    chip::<1>();
    chip::<4>();
    chip::<64>();
    chip::<128>();
    chip::<256>();
    chip::<4096>();
    let card = CardInMemory::new(pattern(9 * CardBlock::LEN));
    for buffers in [1, 2, 3, 9] {
        every_range(Card::new(&card, &mut vec![CardBlock::new(); buffers]).unwrap(), &card.bytes);
    }
    assert_eq!(card.longest.get(), 8, "sectors are read together where there is room");
}

#[test]
fn a_medium_that_is_no_longer_than_what_comes_before_the_image_is_empty() {
    let chip = || Flash::new(Chip::<256> { bytes: pattern(512), fails: None });
    for first in [2, 3, u64::MAX] {
        let mut none = Sectors::new(chip(), first);
        assert_eq!(none.bytes(), 0);
        assert!(none.read(0, &mut []).is_ok());
        let out_of_range = SourceError::OutOfRange { start: 0, blocks: 1 };
        assert_eq!(none.read(0, &mut [Block::ZERO]), Err(out_of_range));
    }
}

#[test]
fn an_error_of_a_driver_is_an_error_of_the_read_and_the_next_read_is_right() {
    let bytes = pattern(10 * 512);
    // From within a sector to within another: three reads of a chip.
    let (start, len) = (3, 50);
    let expected = &bytes[start * Block::BYTES..][..len * Block::BYTES];
    let mut into = vec![Block::ZERO; len];
    for fails in 0..3 {
        let chip = Chip::<512> { bytes: bytes.clone(), fails: Some(fails) };
        let mut device = Sectors::new(Flash::new(chip), 0);
        assert_eq!(device.read(start as u32, &mut into), Err(SourceError::Device), "read {fails}");
        device.read(start as u32, &mut into).unwrap();
        assert_eq!(into.as_bytes(), expected);
    }
    let card = CardInMemory::new(bytes.clone());
    let mut through = [CardBlock::new(), CardBlock::new()];
    // The first sector, the six whole ones in three reads of two, and the last.
    for fails in 0..5 {
        card.fails.set(Some(fails));
        let mut device = Sectors::new(Card::new(&card, &mut through).unwrap(), 0);
        assert_eq!(device.read(start as u32, &mut into), Err(SourceError::Device), "read {fails}");
        device.read(start as u32, &mut into).unwrap();
        assert_eq!(into.as_bytes(), expected);
    }
    let silent = CardInMemory { tells_its_size: false, ..CardInMemory::new(bytes) };
    assert_eq!(Card::new(&silent, &mut through).unwrap_err(), SourceError::Device);
}

#[test]
#[should_panic(expected = "sectors are read into something")]
fn a_card_without_a_buffer_is_a_mistake() {
    let _ = Card::new(&CardInMemory::new(Vec::new()), &mut []);
}

const IDS: [u32; 4] = [1, 5, 9, 100];

/// An image of the smallest shape.
fn tiny() -> Packed {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tiny");
    bitnet_pack::dummy(&path, &Preset::Tiny.shape(), &Options::default(), 1, &mut ()).unwrap();
    Packed::read(&path)
}

/// Calls `f` with a model of `packed` whose weights come from `source`, and an empty conversation.
fn with_model<R>(
    packed: &Packed,
    source: &mut dyn WeightSource,
    f: impl FnOnce(&mut Model<'_>, &mut State<'_>) -> R,
) -> R {
    let image = packed.image();
    let config = image.header().config;
    let limits: Limits = image.header().plan.limits;
    let plan = Plan::new(&config, &limits);
    let (mut scratch, mut state) = (vec![Block::ZERO; plan.scratch], vec![Block::ZERO; plan.state]);
    let mut state = State::new(&config, &limits, &mut state).unwrap();
    let mut model = Model::new(&image, limits, backend::best(), &Serial, source, &mut scratch).unwrap();
    f(&mut model, &mut state)
}

fn logits(model: &mut Model<'_>, state: &mut State<'_>) -> Result<u64, Error> {
    let mut rows = Vec::new();
    model.prefill_each(state, &IDS, &mut |_, logits| rows.push(logits.to_vec()))?;
    Ok(fingerprint(&rows))
}

/// The image behind something else in its first sectors, and zeros up to whole sectors.
fn on_a_medium(packed: &Packed, before: usize) -> Vec<u8> {
    let image = packed.blocks().as_bytes();
    let mut bytes = vec![0xff; before];
    bytes.extend(image);
    bytes.resize(bytes.len().next_multiple_of(4096), 0);
    bytes
}

#[test]
fn a_model_by_way_of_a_driver_gives_the_logits_of_one_in_memory() {
    let packed = tiny();
    let expected = with_model(&packed, &mut Mapped::new(packed.blocks()), |m, s| logits(m, s).unwrap());
    let image = packed.image();
    let least = Streamed::<Sectors<Flash<Chip<1>>>>::staging_blocks_min(&image);
    let mut staging = vec![Block::ZERO; least];

    let chip = Chip::<256> { bytes: on_a_medium(&packed, 3 * 256), fails: None };
    let device = Sectors::new(Flash::new(chip), 3);
    let mut source = Streamed::new(device, &mut staging);
    assert_eq!(with_model(&packed, &mut source, |m, s| logits(m, s).unwrap()), expected);

    let card = CardInMemory::new(on_a_medium(&packed, 2048 * 512));
    let mut through = vec![CardBlock::new(); 32];
    let device = Sectors::new(Card::new(&card, &mut through).unwrap(), 2048);
    let mut source = Streamed::new(device, &mut staging);
    assert_eq!(with_model(&packed, &mut source, |m, s| logits(m, s).unwrap()), expected);

    // Read ahead, in pieces of whole sectors.
    let chip = Chip::<4096> { bytes: on_a_medium(&packed, 4096), fails: None };
    let options = RingOptions { slots: 2, patience: Duration::from_secs(20), verify: true, spans: 0 };
    let device = Sectors::new(Flash::new(chip), 1);
    let mut ring = Ring::start(vec![device], &image, Pieces::new(&image, 0), options).unwrap();
    assert_eq!(with_model(&packed, &mut ring, |m, s| logits(m, s).unwrap()), expected);
}

#[test]
fn a_driver_that_fails_in_a_pass_leaves_the_conversation_as_it_was() {
    let packed = tiny();
    let expected = with_model(&packed, &mut Mapped::new(packed.blocks()), |m, s| logits(m, s).unwrap());
    let mut staging = vec![Block::ZERO; Streamed::<Sectors<Flash<Chip<1>>>>::staging_blocks_min(&packed.image())];
    let card = CardInMemory::new(on_a_medium(&packed, 0));
    let mut through = vec![CardBlock::new(); 8];
    let device = Sectors::new(Card::new(&card, &mut through).unwrap(), 0);
    let mut source = Streamed::new(device, &mut staging);
    with_model(&packed, &mut source, |model, state| {
        let mut failed = 0;
        for fails in (0..).step_by(13) {
            card.fails.set(Some(fails));
            match logits(model, state) {
                Err(error) => assert_eq!(error, Error::Source(SourceError::Device)),
                Ok(found) => {
                    assert_eq!(found, expected, "no read of the pass failed");
                    break;
                }
            }
            assert_eq!(state.position(), 0, "the pass that failed");
            failed += 1;
            card.fails.set(None);
            assert_eq!(logits(model, state).unwrap(), expected, "the pass after read {fails} failed");
            state.rewind(0);
        }
        assert!(failed > 10, "{failed}");
    });
}
