//! The log: defmt's frames, after one line of plain text that says which image wrote it.
//!
//! Frames are numbers, and their texts stay in the ELF file. So whoever finds a log has to know the file, and the first line has
//! its version and build id, the linker's checksum of it (`readelf -n`).
use core::cell::UnsafeCell;
use core::fmt::{self, Display};
use core::slice;

unsafe extern "C" {
    static __build_id_start: u8;
    static __build_id_end: u8;
}

/// The linker's checksum of the program.
#[derive(Clone, Copy, Debug)]
pub struct BuildId;

impl Display for BuildId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        /// The note's header: three lengths and `GNU\0`.
        const HEADER: usize = 16;
        let (start, end) = (&raw const __build_id_start, &raw const __build_id_end);
        // SAFETY: the linker script puts the note, and nothing else, between the two.
        let note = unsafe { slice::from_raw_parts(start, end.addr() - start.addr()) };
        note.get(HEADER..).unwrap_or_default().iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Where the frames go.
struct Log(UnsafeCell<State>);

struct State {
    encoder: defmt::Encoder,
    /// Held from a frame's start to its end.
    lock: critical_section::RestoreState,
    #[cfg(feature = "semihosting")]
    file: Option<semihosting::fs::File>,
}

// SAFETY: the state is touched only between `acquire` and `release`, within a critical section, and by `open` in one.
unsafe impl Sync for Log {}

static LOG: Log = Log(UnsafeCell::new(State {
    encoder: defmt::Encoder::new(),
    lock: critical_section::RestoreState::invalid(),
    #[cfg(feature = "semihosting")]
    file: None,
}));

/// Opens the log, a file of the host. Without a host there is none, and frames go nowhere.
pub fn open(path: &core::ffi::CStr) {
    #[cfg(feature = "semihosting")]
    critical_section::with(|_| {
        // SAFETY: within a critical section, as said above.
        unsafe { (*LOG.0.get()).file = semihosting::fs::File::create(path).ok() };
        let mut line = heapless::String::<96>::new();
        // The line is shorter than that.
        let _ = fmt::write(&mut line, format_args!("bitnet-edge {} build {BuildId}\n", env!("CARGO_PKG_VERSION")));
        sink(line.as_bytes());
    });
    #[cfg(not(feature = "semihosting"))]
    let _ = path;
}

/// Writes to the file. Only within a frame, or in `open`.
#[cfg_attr(not(feature = "semihosting"), expect(unused_variables, reason = "there is no file"))]
fn sink(bytes: &[u8]) {
    #[cfg(feature = "semihosting")]
    {
        use semihosting::io::Write;
        // SAFETY: this is called within a critical section alone, and what the encoder borrows meanwhile is another field.
        if let Some(file) = unsafe { &mut (*LOG.0.get()).file } {
            // A log that cannot be written must not end the run.
            let _ = file.write_all(bytes);
        }
    }
}

#[defmt::global_logger]
struct Logger;

// SAFETY: a frame is a critical section from its start to its end, so frames of several cores do not mix.
unsafe impl defmt::Logger for Logger {
    fn acquire() {
        // SAFETY: `release` ends it with what it gave.
        let lock = unsafe { critical_section::acquire() };
        // SAFETY: within a critical section.
        unsafe {
            (&raw mut (*LOG.0.get()).lock).write(lock);
            (*LOG.0.get()).encoder.start_frame(sink);
        }
    }
    unsafe fn flush() {}
    unsafe fn release() {
        // SAFETY: within the critical section that `acquire` began.
        unsafe {
            (*LOG.0.get()).encoder.end_frame(sink);
            let lock = (&raw mut (*LOG.0.get()).lock).read();
            critical_section::release(lock);
        }
    }
    unsafe fn write(bytes: &[u8]) {
        // SAFETY: as above.
        unsafe { (*LOG.0.get()).encoder.write(bytes, sink) }
    }
}

defmt::timestamp!("{=u64:us}", crate::time::micros());

#[defmt::panic_handler]
fn panic() -> ! {
    panic!("see the log")
}
