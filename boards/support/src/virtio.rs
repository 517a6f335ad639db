//! A virtio disk as the image's medium.
use crate::cores::CORES_MAX;
use crate::memory::{STACK_BASE, STACK_SLOT};
use bitnet_runtime::error::SourceError;
use bitnet_runtime::source::SectorDevice;
use core::fmt;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use virtio_drivers::device::blk::{SECTOR_SIZE, VirtIOBlk};
use virtio_drivers::transport::mmio::MmioTransport;
use virtio_drivers::transport::{DeviceType, Transport};
use virtio_drivers::{BufferDirection, Hal, PAGE_SIZE, PhysAddr};

/// Bytes of one transport's registers.
const TRANSPORT_BYTES: usize = 0x200;
/// Sectors of one request.
const REQUEST_SECTORS: usize = 1 << 11;

/// A disk.
pub struct Disk {
    device: VirtIOBlk<Memory, MmioTransport<'static>>,
}

impl fmt::Debug for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Disk").field("sectors", &self.device.capacity()).finish()
    }
}

impl Disk {
    /// The first disk among `count` transports, which lie one after the other from `address`.
    ///
    /// # Safety
    /// Transports lie there, mapped as Device memory, and nothing else uses them.
    pub unsafe fn find(address: usize, count: usize) -> Option<Self> {
        (0..count).find_map(|i| {
            let header = NonNull::new((address + i * TRANSPORT_BYTES) as *mut _)?;
            // SAFETY: the caller's.
            let transport = unsafe { MmioTransport::new(header, TRANSPORT_BYTES) }.ok()?;
            let disk = transport.device_type() == DeviceType::Block;
            let device = disk.then(|| VirtIOBlk::new(transport).ok())??;
            Some(Self { device })
        })
    }
}

impl SectorDevice for Disk {
    const SECTOR_BYTES: usize = SECTOR_SIZE;

    fn sectors(&self) -> u64 {
        self.device.capacity()
    }
    fn read_sectors(&mut self, first: u64, into: &mut [u8]) -> Result<(), SourceError> {
        let mut sector = first as usize;
        for piece in into.chunks_mut(REQUEST_SECTORS * SECTOR_SIZE) {
            self.device.read_blocks(sector, piece).map_err(|_| SourceError::Device)?;
            sector += piece.len() / SECTOR_SIZE;
        }
        Ok(())
    }
}

/// Memory that the device shares: pages of the queue's own, and buffers where they lie.
struct Memory;

/// Pages for queues: one device has one queue of 16 entries, in two runs of pages.
const PAGES: usize = 8;

#[repr(align(4096))]
struct Pages(core::cell::UnsafeCell<[[u8; PAGE_SIZE]; PAGES]>);

// SAFETY: each page is given out once, by a counter.
unsafe impl Sync for Pages {}

static POOL: Pages = Pages(core::cell::UnsafeCell::new([[0; PAGE_SIZE]; PAGES]));
static TAKEN: AtomicUsize = AtomicUsize::new(0);

unsafe extern "C" {
    static __stacks: u8;
}

// SAFETY: pages are zero, aligned, and given out once; addresses of RAM are physical but for the stacks, whose place is known.
unsafe impl Hal for Memory {
    fn dma_alloc(pages: usize, _: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        let first = TAKEN.fetch_add(pages, Relaxed);
        assert!(first + pages <= PAGES, "one disk has one queue");
        // SAFETY: within the pool, as was just checked.
        let page = unsafe { POOL.0.get().cast::<u8>().add(first * PAGE_SIZE) };
        let page = NonNull::new(page).expect("a static has an address");
        (page.addr().get() as PhysAddr, page)
    }
    unsafe fn dma_dealloc(_: PhysAddr, _: NonNull<u8>, _: usize) -> i32 {
        // A disk is for ever.
        0
    }
    unsafe fn mmio_phys_to_virt(_: PhysAddr, _: usize) -> NonNull<u8> {
        unreachable!("of PCI alone")
    }
    unsafe fn share(buffer: NonNull<[u8]>, _: BufferDirection) -> PhysAddr {
        let address = buffer.cast::<u8>().addr().get();
        match address.checked_sub(STACK_BASE as usize) {
            Some(offset) if offset < CORES_MAX * STACK_SLOT => ((&raw const __stacks).addr() + offset) as PhysAddr,
            _ => address as PhysAddr,
        }
    }
    unsafe fn unshare(_: PhysAddr, _: NonNull<[u8]>, _: BufferDirection) {}
}
