//! Writes what a package has beside the program and can be told by the definition of the options alone: the manual pages, what shells
//! complete, and the configuration file. `cargo run -p bitnetd --example package -- FOLDER`; `cargo xtask deb` calls it.
use anyhow::{Context as _, Result};
use clap::{Arg, ArgAction, Command};
use clap_complete::{Shell, generate};
use clap_mangen::Man;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

/// The program, after which files are named.
const NAME: &str = "bitnetd";
/// The model that the package brings.
const MODEL: &str = "/usr/share/bitnetd/stories-ternary.bitnet";
/// Columns of the configuration file.
const COLUMNS: usize = 100;

fn main() -> Result<()> {
    let folder = std::env::args_os().nth(1).context("expected a folder to write to")?;
    let folder = Path::new(&folder);
    fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
    for (name, bytes) in files()? {
        let path = folder.join(name);
        fs::write(&path, bytes).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}

/// The name of each file, and what is in it.
fn files() -> Result<Vec<(String, Vec<u8>)>> {
    let command = bitnetd::config::command().name(NAME);
    let mut files = vec![(format!("{NAME}.toml"), configuration(&command).into_bytes())];
    // What `bitnetd help` would print is on the page. Subcommands get the name by which they are called.
    let mut described = command.clone().disable_help_subcommand(true);
    described.build();
    for command in std::iter::once(&described).chain(described.get_subcommands()) {
        let man = Man::new(command.clone());
        let mut page = Vec::new();
        man.render(&mut page)?;
        files.push((man.get_filename(), page));
    }
    for (shell, name) in [(Shell::Bash, "bitnetd.bash"), (Shell::Zsh, "_bitnetd"), (Shell::Fish, "bitnetd.fish")] {
        let mut script = Vec::new();
        generate(shell, &mut command.clone(), NAME, &mut script);
        files.push((name.to_owned(), script));
    }
    Ok(files)
}

/// Every option with what it does and, behind `#`, its default; the model, which there has to be, first.
fn configuration(command: &Command) -> String {
    let mut text = String::new();
    let comment = |text: &mut String, words: &str| {
        for line in wrapped(words) {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "# {line}");
        }
    };
    comment(
        &mut text,
        "Options of bitnetd(1), which the service reads when it starts: `systemctl restart bitnetd` after a change. Lines that \
         begin with `#` and a name have the default; those without a value, whatever the words above them say. `bitnetd doctor \
         --config FILE` says what would be done and whether anything is wrong.",
    );
    let mut options: Vec<&Arg> = command.get_arguments().filter(|arg| is_option(arg)).collect();
    options.sort_by_key(|arg| !arg.is_required_set());
    for arg in options {
        let name = arg.get_long().expect("an option has a long name");
        text.push('\n');
        comment(&mut text, &help(arg));
        if name == "model" {
            let _ = writeln!(text, "{name} = \"{MODEL}\"");
        } else {
            let _ = writeln!(text, "#{}", format!("{name} = {}", default(arg).unwrap_or_default()).trim_end());
        }
    }
    text
}

/// Whether a file may have it.
fn is_option(arg: &Arg) -> bool {
    let takes = matches!(arg.get_action(), ArgAction::Set | ArgAction::Append | ArgAction::SetTrue);
    takes && arg.get_long().is_some_and(|name| name != "config")
}

/// What it does, and what it may be.
fn help(arg: &Arg) -> String {
    let help = arg.get_long_help().or_else(|| arg.get_help()).map(ToString::to_string).unwrap_or_default();
    // What is parsed has lost its full stop.
    let help = format!("{}.", help.trim_end_matches('.'));
    let may_be: Vec<String> = match arg.get_action() {
        ArgAction::SetTrue => Vec::new(),
        _ => arg.get_possible_values().iter().map(|value| value.get_name().to_owned()).collect(),
    };
    if may_be.is_empty() { help } else { format!("{help} One of {}.", may_be.join(", ")) }
}

/// The default in TOML, if there is one.
fn default(arg: &Arg) -> Option<String> {
    if matches!(arg.get_action(), ArgAction::SetTrue) {
        return Some("false".to_owned());
    }
    let value = arg.get_default_values().first()?.to_str()?;
    Some(if value.parse::<u64>().is_ok() { value.to_owned() } else { format!("{value:?}") })
}

/// Words in lines of [`COLUMNS`], with the mark of a comment.
fn wrapped(words: &str) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in words.split_whitespace() {
        let line = lines.last_mut().expect("there is a line");
        if !line.is_empty() && "# ".len() + line.len() + 1 + word.len() > COLUMNS {
            lines.push(word.to_owned());
        } else {
            let space = if line.is_empty() { "" } else { " " };
            line.extend([space, word]);
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use bitnetd::config::Task;
    use toml::de::DeTable;

    fn text(name: &str) -> String {
        let (_, bytes) = files().unwrap().into_iter().find(|(file, _)| file == name).unwrap();
        String::from_utf8(bytes).unwrap()
    }
    fn here(path: &str) -> std::path::PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
    }
    /// What the daemon makes of a configuration.
    fn settings(text: &str) -> String {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), text).unwrap();
        let path = file.path().to_str().unwrap();
        let task = Task::new(["bitnetd", "--config", path]).unwrap_or_else(|e| panic!("{e:#}\n{text}"));
        format!("{task:?}").replace(path, "FILE")
    }

    #[test]
    fn the_configuration_has_every_option_with_its_true_default() {
        let shipped = text("bitnetd.toml");
        let plain = settings(&format!("model = '{MODEL}'"));
        assert_eq!(settings(&shipped), plain);
        let option = |line: &str| line.starts_with('#') && !line.starts_with("# ");
        let uncommented: Vec<&str> = shipped
            .lines()
            .filter(|line| !line.ends_with(" ="))
            .map(|line| if option(line) { &line[1..] } else { line })
            .collect();
        assert_eq!(settings(&uncommented.join("\n")), plain);
        let command = bitnetd::config::command();
        for arg in command.get_arguments().filter(|arg| is_option(arg)) {
            let key = format!("{} =", arg.get_long().unwrap());
            let lines: Vec<_> = shipped.lines().filter(|line| line.trim_start_matches('#').starts_with(&key)).collect();
            let [line] = lines[..] else { panic!("{key} {lines:?}") };
            let has_default = !arg.get_default_values().is_empty() || matches!(arg.get_action(), ArgAction::SetTrue);
            assert_eq!(line.ends_with(" ="), !has_default && key != "model =", "{line}");
            assert_eq!(line.starts_with('#'), key != "model =", "{line}");
        }
        assert!(shipped.lines().all(|line| line.len() <= COLUMNS), "{shipped}");
    }

    #[test]
    fn manual_and_completions_name_every_option() {
        for arg in bitnetd::config::command().get_arguments() {
            let Some(name) = arg.get_long() else { continue };
            let roff = name.replace('-', r"\-");
            for page in ["bitnetd.1", "bitnetd-doctor.1"] {
                assert!(text(page).contains(&format!(r"\fB\-\-{roff}\fR")), "{page} lacks --{name}");
            }
            // Each shell has its way to say where the name ends.
            for (script, start, ends) in [
                ("bitnetd.bash", "--", &[' '][..]),
                ("_bitnetd", "--", &['=', '[']),
                ("bitnetd.fish", "-l ", &[' ', '\n']),
            ] {
                let text = text(script);
                let named = ends.iter().any(|end| text.contains(&format!("{start}{name}{end}")));
                assert!(named, "{script} lacks --{name}");
            }
        }
    }

    #[test]
    fn the_package_has_what_is_made_for_it_and_nothing_that_is_not_there() {
        let manifest = fs::read_to_string(here("Cargo.toml")).unwrap();
        let manifest = DeTable::parse(&manifest).unwrap();
        let metadata = manifest.get_ref().get("package").unwrap().get_ref().get("metadata").unwrap();
        let deb = metadata.get_ref().get("deb").unwrap().get_ref();
        let string = |key: &str| deb.get(key).unwrap().get_ref().as_str().unwrap();
        for file in ["license-file", "changelog", "maintainer-scripts"] {
            assert!(here(string(file)).exists(), "{file}");
        }
        // `cargo xtask deb` compresses manual pages, and adds what is named below.
        let packed = |name: String| if name.ends_with(".1") { format!("{name}.gz") } else { name };
        let mut made: Vec<String> = files().unwrap().into_iter().map(|(name, _)| packed(name)).collect();
        made.extend(["bitnetd", "notices", MODEL.rsplit('/').next().unwrap()].map(str::to_owned));
        let mut installed = Vec::new();
        for asset in deb.get("assets").unwrap().get_ref().as_array().unwrap() {
            let [source, place, mode] = [0, 1, 2].map(|i| asset.get_ref().get(i).unwrap().get_ref().as_str().unwrap());
            let name = source.rsplit('/').next().unwrap();
            if let Some(name) = source.strip_prefix("target/release/deb/") {
                let at = made.iter().position(|made| made == name).unwrap_or_else(|| panic!("nothing makes {source}"));
                made.remove(at);
            } else {
                assert!(here(source).is_file(), "{source}");
            }
            assert_eq!(mode == "755", place == "usr/bin/", "{source}");
            installed.push(if place.ends_with('/') { format!("/{place}{name}") } else { format!("/{place}") });
        }
        assert!(made.is_empty(), "made for the package and not in it: {made:?}");
        // What the unit starts and the configuration names is there.
        let unit = fs::read_to_string(here("systemd/bitnetd.service")).unwrap();
        let start = unit.lines().find_map(|line| line.strip_prefix("ExecStart=")).unwrap();
        for path in start.split_whitespace().filter(|word| word.starts_with('/')).chain([MODEL]) {
            assert!(installed.iter().any(|installed| installed == path), "{path} is not in the package: {installed:?}");
        }
        let changelog = fs::read_to_string(here("debian/changelog")).unwrap();
        assert!(changelog.starts_with(&format!("bitnetd ({}-1) ", env!("CARGO_PKG_VERSION"))), "{changelog}");
    }
}
