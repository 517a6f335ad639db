//! What clusters and proxies are told of the daemon, held to the daemon: options, port, paths, metrics, times.
use crate::Daemon;
use bitnetd::ROUTES;
use bitnetd::config::{Settings, Task, command};
use std::path::Path;
use std::time::Duration;

/// Every file below boards/bitnetd/deploy, by its path there.
fn files() -> Vec<(String, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../boards/bitnetd/deploy");
    let (mut folders, mut files) = (vec![root.clone()], Vec::new());
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                let name = path.strip_prefix(&root).unwrap().to_str().unwrap().to_owned();
                files.push((name, std::fs::read_to_string(&path).unwrap()));
            }
        }
    }
    files
}

fn file(name: &str) -> String {
    files().into_iter().find(|(path, _)| path == name).unwrap_or_else(|| panic!("there is no {name}")).1
}

/// What follows `key` on the lines that begin with it, or with a dash and it.
fn values<'t>(text: &'t str, key: &str) -> Vec<&'t str> {
    let value = |line: &'t str| line.trim().trim_start_matches("- ").strip_prefix(key);
    text.lines().filter_map(value).map(|value| value.trim().trim_matches('"').trim_end_matches(';')).collect()
}

fn value<'t>(text: &'t str, key: &str) -> &'t str {
    let [value] = values(text, key)[..] else { panic!("`{key}` should be there once") };
    value
}

fn seconds(text: &str) -> Duration {
    Duration::from_secs(text.trim_end_matches('s').parse().unwrap())
}

/// What the daemon does with these words; keys are those of a file that is there.
fn settings(words: &[&str]) -> Settings {
    let keys = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(keys.path(), "a-key-of-some-length\n").unwrap();
    let key_file = format!("--api-key-file={}", keys.path().display());
    let there = words.iter().map(|word| if word.starts_with("--api-key-file=") { &*key_file } else { word });
    match Task::new(["bitnetd"].into_iter().chain(there)).unwrap() {
        Task::Serve(settings) => settings,
        Task::Doctor(_) => panic!("it is to serve"),
    }
}

#[test]
fn the_container_starts_a_daemon_that_its_probes_and_services_find() {
    let deployment = file("base/deployment.yaml");
    let words = values(&deployment, "--").into_iter().map(|word| format!("--{word}")).collect::<Vec<_>>();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let serve = settings(&words).serve;
    let port = serve.listen.port().to_string();
    assert_eq!(value(&deployment, "containerPort: "), port);
    assert_eq!(value(&deployment, "prometheus.io/port: "), port);
    let service = file("base/service.yaml");
    assert!(values(&service, "port: ").iter().all(|value| *value == port), "{service}");
    for name in ["base/deployment.yaml", "base/service.yaml", "base/network.yaml"] {
        let text = file(name);
        for key in ["port: ", "targetPort: "] {
            let ports = values(&text, key);
            assert!(ports.iter().all(|value| *value == "http" || *value == port), "{name}: {ports:?}");
        }
    }
    let probes = values(&deployment, "path: ");
    assert_eq!(probes, ["/health"; 3]);
    assert!(ROUTES.contains(&probes[0]) && ROUTES.contains(&value(&deployment, "prometheus.io/path: ")));
    // A pod has to have as long as it waits for proxies and then for replies.
    let stop = seconds(value(&deployment, "seconds: ")) + serve.drain_seconds;
    assert!(seconds(value(&deployment, "terminationGracePeriodSeconds: ")) > stop, "{stop:?}");
    // What overlays add.
    let mut added = 0;
    for (_, text) in files().iter().filter(|(name, _)| name.starts_with("overlays/")) {
        for word in values(text, "value: ").into_iter().filter(|word| word.starts_with("--")) {
            settings(&[&words[..], &[word]].concat());
            added += 1;
        }
    }
    assert!(added >= 3, "{added}");
}

#[test]
fn proxies_give_requests_and_replies_what_the_daemon_gives_them() {
    let serve = settings(&["--model=x"]).serve;
    let (haproxy, nginx) = (file("affinity/haproxy.cfg"), file("affinity/nginx.conf"));
    for wait in [value(&haproxy, "timeout server "), value(&nginx, "proxy_read_timeout ")] {
        assert!(seconds(wait) > serve.reply_seconds, "{wait}");
    }
    let body = value(&nginx, "client_max_body_size ");
    assert_eq!(value(&nginx, "client_body_buffer_size "), body);
    assert_eq!(body.strip_suffix('m').unwrap().parse::<usize>().unwrap() << 20, serve.body_bytes);
    let check = value(&haproxy, "http-check send meth GET uri ");
    assert!(ROUTES.contains(&check.split(' ').next().unwrap()), "{check}");
    // By the formula of the file, for the daemons that it has and the sessions that a daemon has by default.
    let percent: usize = value(&haproxy, "hash-balance-factor ").parse().unwrap();
    let daemons = values(&haproxy, "server ").len();
    assert_eq!((daemons, percent), (2, 100 * daemons - 24));
}

/// Words of a text that begin so.
fn words<'t>(text: &'t str, start: &str) -> Vec<&'t str> {
    let found =
        text.match_indices(start).filter(|(at, _)| !text[..*at].ends_with(|c: char| c.is_alphanumeric() || c == '-'));
    let end =
        |rest: &'t str| rest.find(|c: char| !(c.is_ascii_alphanumeric() || "-_".contains(c))).unwrap_or(rest.len());
    found.map(|(at, _)| &text[at..at + end(&text[at..])]).collect()
}

#[test]
fn what_is_named_is_there() {
    let daemon = Daemon::start(&[]);
    let (_, metrics) = daemon.get("/metrics");
    let options = command();
    let (mut named, mut read) = (0, 0);
    for (name, text) in files() {
        for metric in words(&text, "bitnetd_") {
            assert!(metrics.contains(&format!("\n{metric} ")), "{name}: {metric}");
            read += 1;
        }
        for option in words(&text, "--") {
            let long = option.trim_start_matches('-');
            let there = options.get_arguments().any(|arg| arg.get_long() == Some(long));
            // Of kubectl.
            assert!(there || long == "from-file" || long.is_empty(), "{name}: {option}");
            named += usize::from(there);
        }
    }
    assert!(read >= 2 && named >= 10, "{read} metrics and {named} options");
}
