//! The conformance suite on a PC without an operating system: how AVX-512 runs in the tests on machines that lack it.
//!
//! `cargo xtask test bochs` builds this, boots it in Bochs on one CPU after another, and reads what it writes to port 0xe9: the
//! name of the best backend of that CPU, that it conforms or where it differs from the reference, and `EXIT 0` if all is well.
#![no_std]
#![no_main]

use bitnet_kernel::conformance::{Workspace, check_up_to};
use bitnet_kernels_x86::{avx2, avx512_bw, avx512_vnni};
use core::arch::{asm, global_asm};
use core::fmt::Write;
use core::panic::PanicInfo;

global_asm!(include_str!("start.s"));

/// Bochs' debug port: what is written there appears in its standard output.
struct Port;

impl Write for Port {
    fn write_str(&mut self, text: &str) -> core::fmt::Result {
        text.bytes().for_each(|byte| write_port(0xe9, byte));
        Ok(())
    }
}

fn write_port(port: u16, byte: u8) {
    // SAFETY: nothing on this machine but the emulator listens to the two ports that are written.
    unsafe { asm!("out dx, al", in("dx") port, in("al") byte, options(nomem, nostack, preserves_flags)) }
}

/// Says how it ended and switches the machine off.
fn exit(code: u8) -> ! {
    let _ = writeln!(Port, "EXIT {code}");
    b"Shutdown".iter().for_each(|&byte| write_port(0x8900, byte));
    loop {
        core::hint::spin_loop();
    }
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    let _ = writeln!(Port, "{info}");
    exit(1)
}

/// The largest shape that is multiplied.
const WEIGHTS: usize = 9_000;

static mut WORKSPACE: Workspace = Workspace::ZERO;

#[unsafe(no_mangle)]
extern "C" fn main() -> ! {
    // SAFETY: there is one core, no interrupt, and `main` is called once.
    let workspace = unsafe { &mut *(&raw mut WORKSPACE) };
    // The best alone: the emulator takes half a minute for each, and the list of CPUs has one for each.
    let backend = [avx512_vnni(), avx512_bw(), avx2()].into_iter().flatten().next();
    let Some(k) = backend else {
        let _ = writeln!(Port, "no backend for this CPU");
        exit(1)
    };
    let _ = writeln!(Port, "{} begins", k.name());
    match check_up_to(&[k], workspace, WEIGHTS) {
        Ok(()) => {
            let _ = writeln!(Port, "{} conforms", k.name());
            exit(0)
        }
        Err(difference) => {
            let _ = writeln!(Port, "{difference}");
            exit(1)
        }
    }
}
