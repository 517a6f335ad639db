//! The cores that the system grants this process: which ones (affinity and cpuset), and how much of them (a cgroup's quota).
use crate::cgroup::{Read, group, with_ancestors};
use alloc::format;
use alloc::vec::Vec;
use core::cmp::Reverse;
use core::fmt;
use std::io;

/// The highest number of a core that is believed. Linux is built for at most 8,192.
const CPU_MAX: usize = 8191;

/// What the system grants.
#[derive(Clone, Debug, PartialEq)]
pub struct Granted {
    /// The cores that this thread may run on, by number, ascending: what affinity and the cpuset leave. Empty if unknown.
    pub cores: Vec<usize>,
    /// How many cores' time the cgroup gives, if it limits that.
    pub quota: Option<f64>,
}

impl Granted {
    /// Asks the system.
    pub fn now() -> Self {
        let read = |path: &str| std::fs::read_to_string(path).ok();
        Self { cores: affinity().unwrap_or_default(), quota: quota(&read) }
    }

    /// How many threads can run at the same time, at least one.
    ///
    /// A part of a core counts for nothing: a group that has used up its time is stopped as a whole, with its jobs half done.
    pub fn threads(&self) -> usize {
        let cores = match self.cores.len() {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            n => n,
        };
        // A float too large for an integer becomes the largest.
        self.quota.map_or(cores, |quota| cores.min(quota as usize)).max(1)
    }
}

impl fmt::Display for Granted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.cores.len() {
            0 => write!(f, "{} cores", self.threads())?,
            1 => write!(f, "1 core allowed")?,
            n => write!(f, "{n} cores allowed")?,
        }
        self.quota.map_or(Ok(()), |quota| write!(f, ", time of {quota:.1} granted"))
    }
}

/// How many threads can run at the same time, at least one.
pub fn available() -> usize {
    Granted::now().threads()
}

/// The cores that this thread may run on, by number, ascending.
///
/// # Errors
/// Where the system does not say; only Linux does.
pub fn affinity() -> io::Result<Vec<usize>> {
    // The list has no limit, unlike the system call's sets.
    let status = std::fs::read_to_string("/proc/thread-self/status")?;
    let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
    list.and_then(parse_list).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// Has this thread, and those that it starts from now on, run on these cores alone.
///
/// # Errors
/// If none of them may be used, or the system has no such call; only Linux has.
pub fn set_affinity(cores: &[usize]) -> io::Result<()> {
    #[cfg(target_os = "linux")]
    {
        use rustix::thread::{CpuSet, sched_setaffinity};
        let mut set = CpuSet::new();
        for &core in cores.iter().filter(|&&core| core < CpuSet::MAX_CPU) {
            set.set(core);
        }
        Ok(sched_setaffinity(None, &set)?)
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = cores;
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// `cores` in the order in which threads should have them: one of every physical core before its siblings, and the fast
/// before the slow.
pub fn by_worth(cores: &[usize]) -> Vec<usize> {
    order(cores, &|path| std::fs::read_to_string(path).ok())
}

fn order(cores: &[usize], read: Read<'_>) -> Vec<usize> {
    let mut cores = cores.to_vec();
    cores.sort_by_cached_key(|&core| {
        let about = |what: &str| read(&format!("/sys/devices/system/cpu/cpu{core}/{what}"));
        let siblings = about("topology/thread_siblings_list").and_then(|list| parse_list(&list)).unwrap_or_default();
        let capacity: u32 = about("cpu_capacity").and_then(|text| text.trim().parse().ok()).unwrap_or(0);
        (siblings.iter().position(|&sibling| sibling == core), Reverse(capacity), core)
    });
    cores
}

/// How many cores' time this process's cgroup gives, version 1 or 2: the least that it or a group around it has.
///
/// The groups are looked for where systemd and container engines mount them. Inside a container the name of the group can be
/// that outside of it; its limits are then those of the root that is seen.
fn quota(read: Read<'_>) -> Option<f64> {
    let groups = read("/proc/self/cgroup")?;
    let mut least: Option<f64> = None;
    let mut keep = |limit: Option<f64>| {
        if let Some(limit) = limit {
            least = Some(least.map_or(limit, |least| least.min(limit)));
        }
    };
    for (controllers, path) in groups.lines().filter_map(group) {
        for path in with_ancestors(path) {
            if controllers.is_empty() {
                for mount in ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"] {
                    keep(read(&format!("{mount}{path}/cpu.max")).and_then(|text| parse_cpu_max(&text)));
                }
            } else if controllers.split(',').any(|controller| controller == "cpu") {
                for mount in ["cpu", "cpu,cpuacct", "cpuacct,cpu"] {
                    let about = |what: &str| read(&format!("/sys/fs/cgroup/{mount}{path}/cpu.cfs_{what}_us"));
                    keep(about("quota").zip(about("period")).and_then(|(quota, period)| parse_share(&quota, &period)));
                }
            }
        }
    }
    least
}

/// The limit in a `cpu.max` of version 2, `QUOTA PERIOD` or `max PERIOD`, in cores. `None` if it limits nothing or says
/// nothing.
fn parse_cpu_max(text: &str) -> Option<f64> {
    let mut words = text.split_ascii_whitespace();
    parse_share(words.next()?, words.next()?)
}

/// Microseconds of a period as cores; version 1 writes -1 and version 2 `max` for no limit.
fn parse_share(quota: &str, period: &str) -> Option<f64> {
    let number = |text: &str| text.trim().parse::<u64>().ok().filter(|&n| n > 0);
    Some(number(quota)? as f64 / number(period)? as f64)
}

/// A list of cores as the kernel writes it: `0-3,7` (cpuset(7), "List format"), ascending and each once. `None` if it is
/// not one, is empty, or names a core that Linux cannot have.
fn parse_list(text: &str) -> Option<Vec<usize>> {
    let mut cores = Vec::new();
    for part in text.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let number = |text: &str| {
            let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
            text.parse().ok().filter(|&n: &usize| digits && n <= CPU_MAX)
        };
        let (first, last) = (number(first)?, number(last)?);
        if first > last {
            return None;
        }
        // Whatever the text repeats, the list stays short.
        if cores.last().is_some_and(|&before| before >= first) {
            return None;
        }
        cores.extend(first..=last);
    }
    Some(cores)
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::String;
    use proptest::prelude::*;
    use std::collections::HashMap;

    #[test]
    fn lists_of_cores_are_read_as_the_kernel_writes_them() {
        for (text, expected) in
            [("0", &[0][..]), ("0-3,7\n", &[0, 1, 2, 3, 7]), ("\t2,4-5", &[2, 4, 5]), ("8191", &[8191])]
        {
            assert_eq!(parse_list(text).as_deref(), Some(expected), "{text:?}");
        }
        for text in [
            "",
            "\n",
            ",",
            "0,",
            "-1",
            "3-1",
            "0-",
            "+1",
            "0x1",
            "1 2",
            "8192",
            "0-4294967295",
            "1-2-3",
            "2,1",
            "0-1,1",
            "18446744073709551616",
            "0,0,0",
        ] {
            assert_eq!(parse_list(text), None, "{text:?}");
        }
    }

    #[test]
    fn quotas_are_read_in_both_versions() {
        for (text, expected) in [
            ("max 100000\n", None),
            ("150000 100000\n", Some(1.5)),
            ("1000 100000", Some(0.01)),
            ("18446744073709551615 1", Some(18_446_744_073_709_551_615.0)),
            ("", None),
            ("100000", None),
            ("0 100000", None),
            ("100000 0", None),
            ("-1 100000", None),
            ("nan 1", None),
            ("1e9 1", None),
            ("18446744073709551616 1", None),
        ] {
            assert_eq!(parse_cpu_max(text), expected, "{text:?}");
        }
        assert_eq!(parse_share("-1\n", "100000\n"), None);
        assert_eq!(parse_share("200000\n", "100000\n"), Some(2.0));
    }

    proptest! {
        #[test]
        fn any_text_is_read_without_a_panic(text in "\\PC*", other in "[0-9,\\- \n/:.a-z]*") {
            for text in [&text, &other] {
                let _ = (parse_list(text), parse_cpu_max(text), parse_share(text, text));
                let _ = quota(&|_| Some(text.clone()));
                let _ = order(&[1, 0], &|_| Some(text.clone()));
            }
        }
    }

    fn files<'a>(files: &'a [(&'a str, &'a str)]) -> impl Fn(&str) -> Option<String> {
        let files: HashMap<&str, &str> = files.iter().copied().collect();
        move |path| files.get(path).map(|&text| text.into())
    }

    #[test]
    fn the_least_quota_of_a_group_and_those_around_it_counts() {
        let own = [
            ("/proc/self/cgroup", "0::/system.slice/own\n"),
            ("/sys/fs/cgroup/system.slice/own/cpu.max", "max 100000"),
            ("/sys/fs/cgroup/system.slice/cpu.max", "300000 100000"),
            ("/sys/fs/cgroup/cpu.max", "400000 100000"),
        ];
        assert_eq!(quota(&files(&own)), Some(3.0));
        // Version 1, beside other controllers, one of which has the name in its own.
        let first = [
            ("/proc/self/cgroup", "9:cpuset:/c\n5:cpuacct,cpu:/a\n0::/\n"),
            ("/sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us", "50000\n"),
            ("/sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us", "100000\n"),
            ("/sys/fs/cgroup/cpu/c/cpu.cfs_quota_us", "1\n"),
            ("/sys/fs/cgroup/cpu/c/cpu.cfs_period_us", "100000\n"),
        ];
        assert_eq!(quota(&files(&first)), Some(0.5));
        // A container that sees the root of its own.
        let container = [("/proc/self/cgroup", "0::/../../x"), ("/sys/fs/cgroup/cpu.max", "200000 100000")];
        assert_eq!(quota(&files(&container)), Some(2.0));
        assert_eq!(quota(&files(&[("/proc/self/cgroup", "0::/\n")])), None);
        assert_eq!(quota(&files(&[])), None);
    }

    #[test]
    fn threads_are_those_that_run_at_the_same_time() {
        for (cores, quota, expected) in
            [(4, None, 4), (4, Some(2.5), 2), (1, Some(8.0), 1), (4, Some(0.1), 1), (2, Some(1e30), 2)]
        {
            let granted = Granted { cores: (0..cores).collect(), quota };
            assert_eq!(granted.threads(), expected, "{granted}");
        }
        assert!(available() >= 1);
    }

    #[test]
    fn fast_cores_come_first_and_siblings_last() {
        let cpus = "/sys/devices/system/cpu";
        let list: Vec<(String, &str)> = [(0, "0,2"), (1, "1,3"), (2, "0,2"), (3, "1,3")]
            .iter()
            .map(|(core, siblings)| (format!("{cpus}/cpu{core}/topology/thread_siblings_list"), *siblings))
            .chain(
                [(0, "400"), (1, "1024"), (2, "400"), (3, "1024")]
                    .map(|(core, c)| (format!("{cpus}/cpu{core}/cpu_capacity"), c)),
            )
            .collect();
        let list: Vec<(&str, &str)> = list.iter().map(|(path, text)| (&path[..], *text)).collect();
        assert_eq!(order(&[0, 1, 2, 3], &files(&list)), [1, 0, 3, 2]);
        assert_eq!(order(&[3, 1], &files(&[])), [1, 3]);
    }
}
