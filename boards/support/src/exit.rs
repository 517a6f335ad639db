//! The end: an exit code for whoever debugs or emulates the machine, or rest.

/// All went well.
pub const SUCCESS: i32 = 0;
/// Something was wrong and said so.
pub const FAILURE: i32 = 1;
/// A panic.
pub const PANIC: i32 = 101;
/// An exception of the CPU.
pub const EXCEPTION: i32 = 102;

/// Ends with a code.
pub fn with(code: i32) -> ! {
    #[cfg(feature = "semihosting")]
    semihosting::process::exit(code);
    #[cfg(not(feature = "semihosting"))]
    {
        use core::fmt::Write;
        let _ = writeln!(crate::console::Last, "\nended with {code}");
        loop {
            aarch64_cpu::asm::wfe();
        }
    }
}
