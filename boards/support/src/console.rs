//! The serial port: a PL011, for text in both directions.
use aarch64_cpu::asm::wfe;
use arm_pl011_uart::{DataBits, LineConfig, PL011Registers, Parity, StopBits, Uart};
use core::cell::RefCell;
use core::fmt::{self, Write};
use core::ptr::NonNull;
use critical_section::Mutex;
use heapless::String;
use safe_mmio::UniqueMmioPointer;

static PORT: Mutex<RefCell<Option<Uart<'static>>>> = Mutex::new(RefCell::new(None));

/// Longest line that a person can type.
pub const LINE_MAX: usize = 1024;

/// Text for the serial port. Nothing is written before [`open`].
#[derive(Clone, Copy, Debug)]
pub struct Console;

/// How fast a port is driven.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    /// Bits a second on the line.
    pub baud: u32,
    /// Hertz of the port's own clock.
    pub hertz: u32,
}

/// Opens the port at `address`. Without a clock it is left as the firmware has set it.
///
/// # Panics
/// If the address is 0.
///
/// # Safety
/// A PL011 is mapped there as Device memory, and nothing else uses it.
pub unsafe fn open(address: usize, clock: Option<Clock>) {
    let registers = NonNull::new(address as *mut PL011Registers).expect("a port has an address");
    // SAFETY: the caller's.
    let mut port = Uart::new(unsafe { UniqueMmioPointer::new(registers) });
    if let Some(Clock { baud, hertz }) = clock {
        let line = LineConfig { data_bits: DataBits::Bits8, parity: Parity::None, stop_bits: StopBits::One };
        // What cannot be set stays as it was: there is nowhere to say so.
        let _ = port.enable(line, baud, hertz);
    }
    critical_section::with(|token| PORT.borrow_ref_mut(token).replace(port));
}

impl Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        critical_section::with(|token| match &mut *PORT.borrow_ref_mut(token) {
            Some(port) => text.bytes().try_for_each(|byte| {
                if byte == b'\n' {
                    put(port, b'\r');
                }
                put(port, byte);
                Ok(())
            }),
            None => Ok(()),
        })
    }
}

fn put(port: &mut Uart<'_>, byte: u8) {
    while port.is_tx_fifo_full() {}
    port.write_word(byte);
}

impl Console {
    /// Waits for a line, which is echoed, without what ends it. Backspace takes the last character away. What is not UTF-8, or
    /// beyond [`LINE_MAX`] bytes, is refused and not echoed.
    pub fn line(&mut self) -> String<LINE_MAX> {
        let mut line = String::new();
        let mut character = [0; 4];
        let mut len = 0;
        loop {
            match self.byte() {
                b'\r' | b'\n' => break,
                8 | 127 => {
                    if line.pop().is_some() {
                        let _ = self.write_str("\u{8} \u{8}");
                    }
                    len = 0;
                }
                byte if byte < b' ' => {}
                byte => {
                    character[len] = byte;
                    len += 1;
                    match core::str::from_utf8(&character[..len]) {
                        Ok(text) => {
                            if line.push_str(text).is_ok() {
                                let _ = self.write_str(text);
                            }
                            len = 0;
                        }
                        Err(error) if error.error_len().is_some() || len == character.len() => len = 0,
                        Err(_) => {}
                    }
                }
            }
        }
        let _ = self.write_str("\n");
        line
    }

    fn byte(&mut self) -> u8 {
        loop {
            let word = critical_section::with(|token| PORT.borrow_ref_mut(token).as_mut().map(Uart::read_word));
            if let Some(Ok(Some(byte))) = word {
                return byte;
            }
            // The timer wakes it (`time::wake_often`).
            wfe();
        }
    }
}

/// Text from where the machine may be in any state: after a fault or a panic the port is taken from whoever has it.
#[derive(Debug)]
pub(crate) struct Last;

impl Write for Last {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        crate::cores::break_lock();
        critical_section::with(|token| {
            // A second borrow means that the fault was in the port's own code: then nothing can be said.
            if let Ok(mut port) = PORT.borrow(token).try_borrow_mut()
                && let Some(port) = &mut *port
            {
                text.bytes().for_each(|byte| {
                    if byte == b'\n' {
                        put(port, b'\r');
                    }
                    put(port, byte);
                });
            }
        });
        Ok(())
    }
}
