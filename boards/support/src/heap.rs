//! The allocator. The tokenizer needs it while it is loaded, and a prompt when it is read; a token needs none, which
//! [`allocations`] shows.
use bitnet_kernel::Block;
use core::alloc::{GlobalAlloc, Layout};
use core::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use embedded_alloc::LlffHeap;

struct Counted(LlffHeap);

#[global_allocator]
static HEAP: Counted = Counted(LlffHeap::empty());
static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

// SAFETY: the inner allocator does the work, and what is counted changes nothing.
unsafe impl GlobalAlloc for Counted {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's.
        let memory = unsafe { self.0.alloc(layout) };
        ALLOCATIONS.fetch_add(1, Relaxed);
        MOST.fetch_max(self.0.used(), Relaxed);
        memory
    }
    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: the caller's.
        unsafe { self.0.dealloc(memory, layout) }
    }
}

/// Gives the allocator its memory.
///
/// # Panics
/// If it has some already, or this is none.
pub fn give(memory: &'static mut [Block]) {
    // SAFETY: the memory is lent for ever, and its length is its own.
    unsafe { HEAP.0.init(memory.as_mut_ptr().addr(), size_of_val(memory)) }
}

/// How often memory was asked for so far.
pub fn allocations() -> usize {
    ALLOCATIONS.load(Relaxed)
}

/// The most bytes that were in use at once.
pub fn most() -> usize {
    MOST.load(Relaxed)
}
