//! Looks into a finished program: is it for the right machine, does it run without a dynamic linker, and what does it load?

use anyhow::{Context, Result, bail};

/// The machines that programs are built for, with the numbers that ELF gives them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Machine {
    X86_64 = 62,
    Aarch64 = 183,
}

/// The program header that names a dynamic linker.
const PT_INTERP: u32 = 3;

/// Checks that `bytes` are a 64-bit little-endian ELF program for `machine` that names no dynamic linker, and on ARM that it can
/// be loaded in pages of 16 KiB.
///
/// A static program may be position-independent and then has a dynamic section, so it is the interpreter that counts.
pub(crate) fn check_static(bytes: &[u8], machine: Machine) -> Result<()> {
    if bytes.get(..4) != Some(b"\x7fELF") {
        bail!("it is not an ELF file");
    }
    // Class 2 is 64-bit, data 1 is little-endian.
    if bytes.get(4..6) != Some(&[2, 1]) {
        bail!("it is not 64-bit little-endian");
    }
    let found = number::<2>(bytes, 18)?;
    if found != machine as u64 {
        bail!("it is for machine {found}, not for {machine:?} ({})", machine as u64);
    }
    let (offset, size, count) = (number::<8>(bytes, 32)?, number::<2>(bytes, 54)?, number::<2>(bytes, 56)?);
    if count == 0 {
        bail!("it has no program headers, so it is no program");
    }
    for header in 0..count {
        let at = header.checked_mul(size).and_then(|skip| offset.checked_add(skip)).unwrap_or(u64::MAX);
        if number::<4>(bytes, at)? == u64::from(PT_INTERP) {
            bail!("it names a dynamic linker, so it is not static");
        }
        if machine == Machine::Aarch64 && number::<4>(bytes, at)? == u64::from(PT_LOAD) {
            let (offset, address, align) =
                (number::<8>(bytes, at + 8)?, number::<8>(bytes, at + 16)?, number::<8>(bytes, at + 48)?);
            if align < PAGE_BYTES || offset % PAGE_BYTES != address % PAGE_BYTES {
                bail!("it needs pages smaller than 16 KiB: a part of it is aligned to {align}");
            }
        }
    }
    Ok(())
}

/// The program header of what is loaded.
const PT_LOAD: u32 = 1;
/// Pages of 16 KiB are those of Raspberry Pi OS on a Raspberry Pi 5. What is loaded apart has to lie in pages of its own, or the
/// kernel refuses the program.
const PAGE_BYTES: u64 = 16 << 10;
/// Longest image of memory: that of a bank of flash on QEMU's machine.
const FLAT_BYTES_MAX: u64 = 64 << 20;

/// What a program loads, as one run of memory from its lowest physical address on: the content of a flash, or the file that
/// a board's loader copies to that address.
pub(crate) fn flat(bytes: &[u8]) -> Result<Vec<u8>> {
    check_static(bytes, Machine::Aarch64)?;
    let (offset, size, count) = (number::<8>(bytes, 32)?, number::<2>(bytes, 54)?, number::<2>(bytes, 56)?);
    let mut loaded = Vec::new();
    for at in (0..count).map(|header| offset + header * size) {
        let (from, to, len) = (number::<8>(bytes, at + 8)?, number::<8>(bytes, at + 24)?, number::<8>(bytes, at + 32)?);
        if number::<4>(bytes, at)? == u64::from(PT_LOAD) && len > 0 {
            let content = bytes.get(from as usize..).and_then(|rest| rest.get(..len as usize));
            loaded.push((to, content.context("it is cut off")?));
        }
    }
    let start = loaded.iter().map(|(to, _)| *to).min().context("it loads nothing")?;
    let end = loaded.iter().map(|(to, content)| to + content.len() as u64).max().unwrap_or(start);
    if end - start > FLAT_BYTES_MAX {
        bail!("it loads {} bytes, and {FLAT_BYTES_MAX} is the most", end - start);
    }
    let mut flat = vec![0; (end - start) as usize];
    for (to, content) in loaded {
        flat[(to - start) as usize..][..content.len()].copy_from_slice(content);
    }
    Ok(flat)
}

/// The little-endian number of `N` bytes at an offset.
fn number<const N: usize>(bytes: &[u8], at: u64) -> Result<u64> {
    let start = usize::try_from(at).unwrap_or(usize::MAX);
    let Some(field) = start.checked_add(N).and_then(|end| bytes.get(start..end)) else {
        bail!("it is cut off: nothing at byte {at}");
    };
    Ok(field.iter().rev().fold(0, |sum, &byte| sum << 8 | u64::from(byte)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A header and program headers of the given types, by the layout of the ELF specification.
    fn program(machine: u16, types: &[u32]) -> Vec<u8> {
        let mut bytes = vec![0; 64];
        bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
        bytes[18..20].copy_from_slice(&machine.to_le_bytes());
        bytes[32..40].copy_from_slice(&64_u64.to_le_bytes());
        bytes[54..56].copy_from_slice(&56_u16.to_le_bytes());
        bytes[56..58].copy_from_slice(&u16::try_from(types.len()).unwrap().to_le_bytes());
        for kind in types {
            bytes.extend(kind.to_le_bytes());
            bytes.extend([0; 44]);
            bytes.extend((64_u64 << 10).to_le_bytes());
        }
        bytes
    }

    #[test]
    fn a_program_for_pages_of_4_kib_is_refused_on_arm() {
        let mut bytes = program(183, &[1]);
        bytes[64 + 48..64 + 56].copy_from_slice(&4096_u64.to_le_bytes());
        assert!(complaint(&bytes, Machine::Aarch64).contains("16 KiB"));
        bytes[18] = 62;
        check_static(&bytes, Machine::X86_64).unwrap();
        let mut bytes = program(183, &[1]);
        bytes[64 + 8] = 1;
        assert!(complaint(&bytes, Machine::Aarch64).contains("16 KiB"), "the offset is not the address's");
    }

    #[test]
    fn what_is_loaded_lies_where_its_physical_addresses_say() {
        let mut bytes = program(183, &[1, 2, 1]);
        // Offset, physical address and length of the two that are loaded, whose order in memory is the other one.
        for (header, from, to, len) in [(0, 1, 0x1008, 3), (2, 0, 0x1000, 4)] {
            for (field, value) in [(8, from), (16, from), (24, to), (32, len)] {
                let at = 64 + header * 56 + field;
                bytes[at..at + 8].copy_from_slice(&u64::to_le_bytes(value));
            }
        }
        assert_eq!(flat(&bytes).unwrap(), b"\x7fELF\0\0\0\0ELF");
        bytes[64 + 32] = 255;
        bytes[64 + 33] = 255;
        assert!(flat(&bytes).unwrap_err().to_string().contains("cut off"));
    }

    fn complaint(bytes: &[u8], machine: Machine) -> String {
        check_static(bytes, machine).unwrap_err().to_string()
    }

    #[test]
    fn a_static_program_passes_even_with_a_dynamic_section() {
        check_static(&program(183, &[1, 2, 1]), Machine::Aarch64).unwrap();
        check_static(&program(62, &[1]), Machine::X86_64).unwrap();
    }

    #[test]
    fn an_interpreter_fails_wherever_it_stands() {
        for types in [&[3, 1, 1][..], &[1, 3, 1], &[1, 1, 3]] {
            assert!(complaint(&program(62, types), Machine::X86_64).contains("dynamic linker"));
        }
    }

    #[test]
    fn a_program_for_another_machine_fails() {
        assert!(complaint(&program(62, &[1]), Machine::Aarch64).contains("machine 62"));
    }

    #[test]
    fn what_is_no_program_fails() {
        assert!(complaint(b"#!/bin/sh\n", Machine::X86_64).contains("not an ELF"));
        assert!(complaint(&program(62, &[]), Machine::X86_64).contains("no program headers"));
        let mut narrow = program(62, &[1]);
        narrow[4] = 1;
        assert!(complaint(&narrow, Machine::X86_64).contains("64-bit"));
    }

    #[test]
    fn a_program_cut_at_any_length_is_an_error_and_no_panic() {
        let whole = program(62, &[1, 1]);
        // The last field that is read is the type of the last header; what follows it may be missing.
        for length in 0..64 + 56 + 4 {
            assert!(check_static(&whole[..length], Machine::X86_64).is_err(), "{length} bytes");
        }
        let mut far = whole;
        far[32..40].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(complaint(&far, Machine::X86_64).contains("cut off"));
    }

    /// The programs of the machine that runs the tests are real ones; this one was linked with the C library.
    #[test]
    #[cfg(all(target_os = "linux", target_env = "gnu", target_arch = "x86_64"))]
    fn this_test_itself_is_not_static() {
        let itself = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        assert!(complaint(&itself, Machine::X86_64).contains("dynamic linker"));
    }
}
