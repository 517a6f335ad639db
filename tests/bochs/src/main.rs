//! The conformance suite and whole models on a PC without an operating system: how AVX-512 runs in the tests on machines that lack it.
//!
//! `cargo xtask test bochs` builds this, boots it in Bochs on one CPU after another, and reads what it writes to port 0xe9: the
//! name of the best backend of that CPU, that it conforms or where it differs from the reference, a line with a fingerprint for each
//! pass of each model beside it by that backend and the portable one, and `EXIT 0` if nothing went wrong.
//!
//! A model is a Multiboot module: an image, the number of tokens and these, all of 32 bits, and zeros up to a whole block.
#![no_std]
#![no_main]

mod modules;

use bitnet_kernel::conformance::{Workspace, check_up_to};
use bitnet_kernel::portable::Portable;
use bitnet_kernel::{Block, Kernels};
use bitnet_runtime::memory::KvFormat;
use bitnet_runtime::parallel::Serial;
use bitnet_runtime::source::Mapped;
use bitnet_runtime::{Error, Image, Limits, Model, Plan, State, backend};
use core::arch::{asm, global_asm};
use core::fmt::Write;
use core::panic::PanicInfo;
use zerocopy::{FromBytes, IntoBytes};

use modules::{Module, modules};

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
/// How a model is run: the name of the way to keep keys and values, that way, and the number of tokens in a batch. The portable
/// backend, which is slow and the same code on every CPU, runs the second alone.
const WAYS: [(&str, KvFormat, u32); 3] =
    [("f32", KvFormat::F32, 1), ("f16", KvFormat::F16, 7), ("i8", KvFormat::I8, 16)];
/// Blocks for a model's conversation and activations: 4 MiB.
const MODEL_BLOCKS: usize = (4 << 20) / Block::BYTES;

static mut WORKSPACE: Workspace = Workspace::ZERO;
static mut MEMORY: [Block; MODEL_BLOCKS] = [Block::ZERO; MODEL_BLOCKS];

/// Where the loader tells what it has loaded is the one argument.
#[unsafe(no_mangle)]
extern "C" fn main(information: usize) -> ! {
    // SAFETY: there is one core, no interrupt, and `main` is called once.
    let (workspace, memory) = unsafe { (&mut *(&raw mut WORKSPACE), &mut *(&raw mut MEMORY)) };
    // The best alone: the emulator takes half a minute for each, and the list of CPUs has one for each.
    let best = backend::best();
    let _ = writeln!(Port, "{} begins", best.name());
    if let Err(difference) = check_up_to(&[best], workspace, WEIGHTS) {
        let _ = writeln!(Port, "{difference}");
        exit(1)
    }
    let _ = writeln!(Port, "{} conforms", best.name());
    // SAFETY: the start has kept it, and has mapped the first gigabyte to itself. What lies there is outside this image.
    for module in unsafe { modules(information) } {
        let backends: [(&dyn Kernels, _); 2] = [(best, &WAYS[..]), (&Portable, &WAYS[1..2])];
        for (kernels, ways) in backends {
            for &(name, kv, batch) in ways {
                match pass(module, kernels, kv, batch, memory) {
                    Ok(found) => {
                        let _ = writeln!(Port, "{} {} {name} {found:#018x}", module.name, kernels.name());
                    }
                    Err(error) => {
                        let _ = writeln!(Port, "{}: {error}", module.name);
                        exit(1)
                    }
                }
            }
        }
    }
    exit(0)
}

/// The fingerprint of the logits after every token, as the tests have it: FNV-1a over the bits of the floats.
fn pass(module: Module, kernels: &dyn Kernels, kv: KvFormat, batch: u32, memory: &mut [Block]) -> Result<u64, Error> {
    let bytes = module.blocks.as_bytes();
    let image_bytes = Image::stated_bytes(bytes)?;
    let (blocks, tokens) = module.blocks.split_at(image_bytes as usize / Block::BYTES);
    let image = Image::check(blocks.as_bytes(), image_bytes)?;
    let tokens = <[u32]>::ref_from_bytes(tokens.as_bytes()).expect("whole blocks are whole numbers");
    let tokens = &tokens[1..][..tokens[0] as usize];
    let config = image.header().config;
    let limits = Limits { context: image.header().plan.limits.context, batch, kv };
    let plan = Plan::new(&config, &limits);
    memory.fill(Block::ZERO);
    let (for_state, rest) = memory.split_at_mut(plan.state);
    let mut state = State::new(&config, &limits, for_state)?;
    let mut source = Mapped::new(blocks);
    let mut model = Model::new(&image, limits, kernels, &Serial, &mut source, &mut rest[..plan.scratch])?;
    let mut found = 0xcbf2_9ce4_8422_2325;
    model.prefill_each(&mut state, tokens, &mut |_, logits| {
        let bytes = logits.iter().flat_map(|logit| logit.to_bits().to_le_bytes());
        found = bytes.fold(found, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
    })?;
    Ok(found)
}
