//! Work on items that are not all floats of one slice: one file of unsafe code beside the pool's.
use super::Parallel;
use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicBool, Ordering::Relaxed};

/// Calls `f(i, item)` once for every item, at most `N`, in any order and on any thread; returns when all are done.
pub(crate) fn for_each_item<T: Send, const N: usize>(
    parallel: &dyn Parallel,
    items: impl IntoIterator<Item = T>,
    f: &(dyn Fn(usize, T) + Sync),
) {
    let mut items = items.into_iter();
    let slots: [Slot<T>; N] = core::array::from_fn(|_| Slot::new(items.next()));
    debug_assert!(items.next().is_none(), "more than {N} items");
    let count = slots.iter().take_while(|slot| slot.is_full()).count();
    // What is shared out are slices of floats: here of one each, which nobody looks at.
    parallel.for_each_chunk(&mut [0.0; N][..count], 1, &|i, _| {
        if let Some(item) = slots[i].take() {
            f(i, item);
        }
    });
}

/// An item until somebody takes it.
struct Slot<T> {
    full: AtomicBool,
    item: UnsafeCell<Option<T>>,
}

// SAFETY: a shared slot gives its item to one thread, that which finds `full` set, and nobody else looks at it.
unsafe impl<T: Send> Sync for Slot<T> {}

impl<T> Slot<T> {
    const fn new(item: Option<T>) -> Self {
        Self { full: AtomicBool::new(item.is_some()), item: UnsafeCell::new(item) }
    }
    fn is_full(&self) -> bool {
        self.full.load(Relaxed)
    }
    /// The item, for the first who asks. That the slot was filled before is seen by whoever was given it.
    fn take(&self) -> Option<T> {
        if !self.full.swap(false, Relaxed) {
            return None;
        }
        // SAFETY: `full` is never set again, so this is the only access since the slot was made.
        unsafe { (*self.item.get()).take() }
    }
}

#[cfg(all(test, feature = "std"))]
mod tests {
    use super::super::{Pool, Serial};
    use super::*;
    use alloc::vec;
    use alloc::vec::Vec;

    /// Two threads that both do everything.
    struct Twice;

    impl Parallel for Twice {
        fn threads(&self) -> usize {
            2
        }
        fn for_each_chunk(&self, data: &mut [f32], chunk: usize, f: &(dyn Fn(usize, &mut [f32]) + Sync)) {
            let mut copy = data.to_vec();
            std::thread::scope(|scope| {
                scope.spawn(|| Serial.for_each_chunk(&mut copy, chunk, f));
                Serial.for_each_chunk(data, chunk, f);
            });
        }
    }

    #[test]
    fn every_item_is_taken_once_whatever_the_threads_do() {
        let pool = Pool::new(3).unwrap();
        for parallel in [&Serial as &dyn Parallel, &Twice, &pool] {
            for count in [0, 1, 5, 16] {
                let mut sums = vec![0; count];
                // Vectors, so that one taken twice would be freed twice.
                let items = sums.iter_mut().zip((0..count).map(|i| vec![i; 3])).collect::<Vec<_>>();
                for_each_item::<_, 16>(parallel, items, &|i, (sum, item): (&mut usize, Vec<usize>)| {
                    *sum += 1 + i + item.iter().sum::<usize>();
                });
                assert!(sums.iter().enumerate().all(|(i, &sum)| sum == 1 + 4 * i), "{count} items");
            }
        }
    }
}
