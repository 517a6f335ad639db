//! What the control groups of Linux say of this process, version 1 or 2 (cgroups(7)), and how much memory they leave it.
//!
//! The groups are looked for where systemd and container engines mount them. Inside a container the name of the group can be
//! that outside of it; its limits are then those of the root that is seen.
use alloc::format;
use alloc::string::String;

/// Reads a small file.
pub(crate) type Read<'a> = &'a dyn Fn(&str) -> Option<String>;

/// The controllers and the path of a line of `/proc/self/cgroup`: `number:controllers:path` (cgroups(7)). Version 2 has no
/// controllers.
pub(crate) fn group(line: &str) -> Option<(&str, &str)> {
    line.split_once(':')?.1.split_once(':')
}

/// `/a/b`, `/a`, and nothing for the root. A path that leaves the root that is seen (`/../x`) is the root.
pub(crate) fn with_ancestors(path: &str) -> impl Iterator<Item = &str> {
    let inside = path.starts_with('/') && path.split('/').all(|name| name != "." && name != "..");
    let mut rest = Some(if inside { path.trim_end_matches('/') } else { "" });
    core::iter::from_fn(move || {
        let path = rest?;
        rest = path.rfind('/').map(|at| &path[..at]);
        Some(path)
    })
}

/// Bytes of memory that can still be had without swapping and without being killed: what the system has to give
/// (`MemAvailable`, which counts cached files) and what the memory limits of this process's groups leave. `None` where the
/// system does not tell.
pub fn available_memory() -> Option<u64> {
    available(&|path| std::fs::read_to_string(path).ok())
}

fn available(read: Read<'_>) -> Option<u64> {
    let system = field(&read("/proc/meminfo")?, "MemAvailable:").map(|kib| kib.saturating_mul(1024))?;
    let groups = read("/proc/self/cgroup").unwrap_or_default();
    let limits = groups.lines().filter_map(group).flat_map(|(controllers, path)| {
        with_ancestors(path).filter_map(move |path| match controllers {
            "" => ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"].iter().find_map(|mount| {
                left(
                    read,
                    &format!("{mount}{path}"),
                    ["memory.max", "memory.current"],
                    ["inactive_file", "active_file"],
                )
            }),
            _ if controllers.split(',').any(|controller| controller == "memory") => left(
                read,
                &format!("/sys/fs/cgroup/memory{path}"),
                ["memory.limit_in_bytes", "memory.usage_in_bytes"],
                ["total_inactive_file", "total_active_file"],
            ),
            _ => None,
        })
    });
    Some(limits.fold(system, u64::min))
}

/// What the limit of a group leaves. Cached files count as used there, and are dropped when the group needs memory.
fn left(read: Read<'_>, group: &str, [limit, usage]: [&str; 2], cached: [&str; 2]) -> Option<u64> {
    let number = |file: &str| read(&format!("{group}/{file}"))?.trim().parse::<u64>().ok();
    // "max" is no limit.
    let (limit, usage) = (number(limit)?, number(usage)?);
    let stat = read(&format!("{group}/memory.stat")).unwrap_or_default();
    let cached = cached.iter().filter_map(|name| field(&stat, name)).fold(0, u64::saturating_add);
    Some(limit.saturating_sub(usage.saturating_sub(cached)))
}

/// The number after a name at the beginning of a line.
fn field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name).filter(|rest| rest.starts_with([' ', '\t'])))?;
    line.split_ascii_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// Files by their names.
    fn files<'a>(files: &'a [(&'a str, &'a str)]) -> impl Fn(&str) -> Option<String> + 'a {
        move |path| files.iter().find(|(name, _)| *name == path).map(|(_, text)| (*text).into())
    }

    /// Replay A-18: what is cached can be had, and a group's limit counts even where the machine has more.
    #[test]
    fn the_least_limit_counts_and_cached_files_are_no_use() {
        let machine = ("/proc/meminfo", "MemTotal: 9 kB\nMemAvailable:    1048576 kB\n");
        assert_eq!(available(&files(&[])), None);
        assert_eq!(available(&files(&[machine])), Some(1024 * MIB));
        // Version 2: the group has no limit, the one around it has 300 MiB, of which 200 are used, 150 of them for files.
        let two = [
            machine,
            ("/proc/self/cgroup", "0::/outer/inner\n"),
            ("/sys/fs/cgroup/outer/inner/memory.max", "max\n"),
            ("/sys/fs/cgroup/outer/inner/memory.current", "104857600\n"),
            ("/sys/fs/cgroup/outer/memory.max", "314572800\n"),
            ("/sys/fs/cgroup/outer/memory.current", "209715200\n"),
            ("/sys/fs/cgroup/outer/memory.stat", "anon 52428800\ninactive_file 104857600\nactive_file 52428800\n"),
        ];
        assert_eq!(available(&files(&two)), Some(250 * MIB));
        // Version 1: no limit is a number beyond all memory; names are others.
        let one = [
            machine,
            ("/proc/self/cgroup", "4:memory:/job\n1:cpu:/\n0::/\n"),
            ("/sys/fs/cgroup/memory/job/memory.limit_in_bytes", "167772160\n"),
            ("/sys/fs/cgroup/memory/job/memory.usage_in_bytes", "83886080\n"),
            ("/sys/fs/cgroup/memory/job/memory.stat", "inactive_file 1\ntotal_inactive_file 41943040\n"),
            ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n"),
            ("/sys/fs/cgroup/memory/memory.usage_in_bytes", "83886080\n"),
        ];
        assert_eq!(available(&files(&one)), Some(120 * MIB));
        // A group that is over its limit leaves nothing.
        let over = [
            machine,
            ("/proc/self/cgroup", "0::/a\n"),
            ("/sys/fs/cgroup/a/memory.max", "1048576"),
            ("/sys/fs/cgroup/a/memory.current", "2097152"),
        ];
        assert_eq!(available(&files(&over)), Some(0));
    }
}
