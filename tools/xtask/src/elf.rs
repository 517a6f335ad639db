//! Looks into a finished program: is it for the right machine, and does it run without a dynamic linker?

use anyhow::{Result, bail};

/// The machines that programs are built for, with the numbers that ELF gives them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Machine {
    X86_64 = 62,
    Aarch64 = 183,
}

/// The program header that names a dynamic linker.
const PT_INTERP: u32 = 3;

/// Checks that `bytes` are a 64-bit little-endian ELF program for `machine` that names no dynamic linker.
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
    }
    Ok(())
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
            bytes.extend([0; 52]);
        }
        bytes
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
