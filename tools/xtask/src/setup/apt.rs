//! Debian's package sources: where a machine gets its packages from, and the entry that adds the backports.
//!
//! The address is copied from the machine's own sources. A machine that uses a mirror keeps using it, and no host name
//! stands in this repository.

use std::path::{Path, PathBuf};

/// What is to be done to have the backports.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Backports {
    /// A source has them already.
    Present,
    /// This file has to be written.
    Add { name: &'static str, text: String },
    /// No source of the release itself was found to copy.
    Unknown,
}

/// The codename of the release, where its own QEMU is too old and its backports have a newer one.
pub(crate) fn needs_backports(os_release: &str) -> Option<&'static str> {
    let field = |name: &str| {
        let line = os_release.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
        line.map(|value| value.trim_matches('"'))
    };
    (field("ID") == Some("debian") && field("VERSION_ID") == Some("12")).then_some("bookworm")
}

/// Finds the release among the sources and rewrites its entry to the backports.
pub(crate) fn backports(files: &[(PathBuf, String)], codename: &str) -> Backports {
    let wanted = format!("{codename}-backports");
    let entries: Vec<Entry> = files.iter().flat_map(|(path, text)| entries(path, text)).collect();
    if entries.iter().any(|entry| entry.suites.contains(&wanted)) {
        return Backports::Present;
    }
    let Some(entry) = entries.iter().find(|entry| entry.suites.iter().any(|suite| suite == codename)) else {
        return Backports::Unknown;
    };
    let name = match entry.form {
        Form::Stanza => "bitnet-edge-backports.sources",
        Form::Line => "bitnet-edge-backports.list",
    };
    Backports::Add { name, text: entry.rewritten(&wanted) }
}

/// The two forms in which apt writes a source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    /// `Types: deb`, `URIs: …` and so on, a paragraph each: files named `*.sources`.
    Stanza,
    /// `deb [options] address suite components`, a line each: files named `*.list`.
    Line,
}

/// One enabled source of binary packages.
#[derive(Debug)]
struct Entry {
    form: Form,
    suites: Vec<String>,
    /// The lines of a stanza (comments left out), or the one line.
    lines: Vec<String>,
}

impl Entry {
    /// The same source with another suite and `main` alone: QEMU is there, and no more is wanted.
    fn rewritten(&self, suite: &str) -> String {
        match self.form {
            Form::Stanza => {
                let mut text = String::new();
                let mut skipped = false;
                for line in &self.lines {
                    match field(line) {
                        Some(("suites" | "components" | "types", _)) => skipped = true,
                        // A line that begins with a space continues the field above it: a key may stand in full.
                        None if skipped => {}
                        _ => {
                            skipped = false;
                            text.push_str(line);
                            text.push('\n');
                        }
                    }
                }
                format!("Types: deb\nSuites: {suite}\nComponents: main\n{text}")
            }
            Form::Line => {
                let (options, address, _) = line_parts(&self.lines[0]).expect("it was read before");
                let options = options.map_or(String::new(), |options| format!("[{options}] "));
                format!("deb {options}{address} {suite} main\n")
            }
        }
    }
}

fn entries(path: &Path, text: &str) -> Vec<Entry> {
    if path.extension().is_some_and(|kind| kind == "sources") {
        let mut stanzas = vec![Vec::new()];
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            if line.trim().is_empty() {
                stanzas.push(Vec::new());
            } else if let Some(stanza) = stanzas.last_mut() {
                stanza.push(line.to_owned());
            }
        }
        stanzas.into_iter().filter_map(stanza).collect()
    } else {
        text.lines().filter_map(one_line).collect()
    }
}

fn stanza(lines: Vec<String>) -> Option<Entry> {
    let value = |name: &str| {
        let mut found = None;
        for line in &lines {
            match (field(line), &mut found) {
                (Some((this, rest)), None) if this == name => found = Some(rest.to_owned()),
                (Some(_), Some(_)) => break,
                (None, Some(value)) => {
                    value.push(' ');
                    value.push_str(line.trim());
                }
                _ => {}
            }
        }
        found
    };
    let words = |name: &str| -> Vec<String> {
        value(name).map(|value| value.split_whitespace().map(str::to_owned).collect()).unwrap_or_default()
    };
    let enabled = !value("enabled").is_some_and(|value| matches!(value.trim(), "no" | "false" | "0"));
    let suites = words("suites");
    let usable = enabled && words("types").iter().any(|kind| kind == "deb") && !words("uris").is_empty();
    usable.then_some(Entry { form: Form::Stanza, suites, lines })
}

/// The name of a field, in small letters as case does not matter there, and what follows it on the line.
fn field(line: &str) -> Option<(&'static str, &str)> {
    const NAMES: [&str; 5] = ["types", "uris", "suites", "components", "enabled"];
    if line.starts_with([' ', '\t']) {
        return None;
    }
    let (name, value) = line.split_once(':')?;
    let known = NAMES.into_iter().find(|known| known.eq_ignore_ascii_case(name));
    Some((known.unwrap_or("other"), value.trim()))
}

fn one_line(line: &str) -> Option<Entry> {
    let line = line.split('#').next()?.trim();
    let (_, _, suite) = line_parts(line)?;
    Some(Entry { form: Form::Line, suites: vec![suite.to_owned()], lines: vec![line.to_owned()] })
}

/// Options, address and suite of a line that begins with `deb`.
fn line_parts(line: &str) -> Option<(Option<&str>, &str, &str)> {
    let rest = line.strip_prefix("deb")?;
    if !rest.starts_with([' ', '\t']) {
        return None;
    }
    let rest = rest.trim_start();
    let (options, rest) = match rest.strip_prefix('[') {
        Some(rest) => {
            let (options, rest) = rest.split_once(']')?;
            (Some(options.trim()), rest)
        }
        None => (None, rest),
    };
    let mut words = rest.split_whitespace();
    Some((options, words.next()?, words.next()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The names of hosts here are of the kind reserved for examples.
    const STANZAS: &str = "\
Types: deb
# a comment among the fields
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main contrib
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://mirror.example/debian-security
Suites: bookworm-security
Components: main
";

    fn add(path: &str, text: &str) -> Backports {
        backports(&[(PathBuf::from(path), text.to_owned())], "bookworm")
    }

    #[test]
    fn a_stanza_is_copied_with_its_address_and_key() {
        let expected = "\
Types: deb
Suites: bookworm-backports
Components: main
URIs: http://mirror.example/debian
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
";
        let name = "bitnet-edge-backports.sources";
        assert_eq!(add("debian.sources", STANZAS), Backports::Add { name, text: expected.to_owned() });
    }

    #[test]
    fn a_key_written_in_full_and_suites_over_several_lines_are_understood() {
        let text = "types: deb deb-src\nuris: http://mirror.example/debian\nsuites:\n bookworm\n bookworm-updates\n\
                    components: main\nsigned-by:\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n mQINBF\n";
        let Backports::Add { text, .. } = add("debian.sources", text) else { panic!("nothing to add") };
        assert_eq!(
            text,
            "Types: deb\nSuites: bookworm-backports\nComponents: main\nuris: http://mirror.example/debian\n\
             signed-by:\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n mQINBF\n"
        );
    }

    #[test]
    fn a_line_is_copied_with_its_options() {
        let text = "# deb http://old.example/debian bookworm main\n\
                    deb-src http://mirror.example/debian bookworm main\n\
                    deb [ signed-by=/usr/share/keyrings/k.gpg arch=amd64 ] http://mirror.example/debian bookworm main non-free # x\n";
        let expected = "deb [signed-by=/usr/share/keyrings/k.gpg arch=amd64] http://mirror.example/debian \
                        bookworm-backports main\n";
        let name = "bitnet-edge-backports.list";
        assert_eq!(add("sources.list", text), Backports::Add { name, text: expected.to_owned() });
        let plain = add("sources.list", "deb http://mirror.example/debian bookworm main\n");
        let text = "deb http://mirror.example/debian bookworm-backports main\n".to_owned();
        assert_eq!(plain, Backports::Add { name, text });
    }

    #[test]
    fn an_entry_that_is_there_is_not_written_again() {
        let with = STANZAS.replace("bookworm-updates", "bookworm-updates bookworm-backports");
        assert_eq!(add("debian.sources", &with), Backports::Present);
        let Backports::Add { name, text } = add("debian.sources", STANZAS) else { panic!("nothing to add") };
        let files = [(PathBuf::from("debian.sources"), STANZAS.to_owned()), (PathBuf::from(name), text)];
        assert_eq!(backports(&files, "bookworm"), Backports::Present, "what was written is recognised");
    }

    #[test]
    fn a_disabled_source_and_one_of_another_suite_are_not_copied() {
        let off = STANZAS.replace("Components: main contrib", "Components: main\nEnabled: no");
        assert_eq!(add("debian.sources", &off), Backports::Unknown);
        assert_eq!(add("sources.list", "deb http://mirror.example/debian trixie main\n"), Backports::Unknown);
        assert_eq!(add("sources.list", "debris of a line\n"), Backports::Unknown);
        assert_eq!(add("sources.list", ""), Backports::Unknown);
    }

    #[test]
    fn only_debian_12_needs_backports() {
        let release = "PRETTY_NAME=\"Debian GNU/Linux 12 (bookworm)\"\nVERSION_ID=\"12\"\nID=debian\n";
        assert_eq!(needs_backports(release), Some("bookworm"));
        assert_eq!(needs_backports(&release.replace("\"12\"", "\"13\"")), None);
        assert_eq!(needs_backports("ID=ubuntu\nVERSION_ID=\"24.04\"\n"), None);
        assert_eq!(needs_backports(""), None);
    }
}
