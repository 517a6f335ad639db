//! Manners of a service: the model is exchanged and unloaded without anyone losing a reply, and a stop lets replies end.
//! `cargo xtask test static` looks at the same from outside, with signals and the messages of systemd.
use crate::{Daemon, JSON, TEMPLATE, image, pack_with, request};
use bitnet_host::open::with_model;
use bitnet_runtime::parallel::cpus::{affinity, set_affinity};
use bitnet_runtime::sampler::Sampling;
use bitnet_runtime::tokenizer::Tokenizer;
use bitnet_tests::model;
use bitnetd::Signal;
use bitnetd::config::Task;
use bitnetd::engine::{self, Room};
use bitnetd::metrics::Metrics;
use bitnetd::order::{Event, Finish, Order, Places};
use bitnetd::pulse::Pulse;
use serde_json::{Value, json};
use std::io::Read as _;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// The image of a folder that no other test writes to, with another template than that of [`image`] if `other`.
fn own(name: &str, other: bool) -> String {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let template = if other { TEMPLATE.replace("Assistant: ", "Robot: ") } else { TEMPLATE.to_owned() };
    let config = json!({ "chat_template": template });
    // What a test before this left may be no image, which the packer does not replace.
    let _ = std::fs::remove_file(folder.with_extension("bitnet"));
    pack_with(&model("stories-ternary"), &folder, &[("tokenizer_config.json", &config)])
}

fn status(daemon: &Daemon) -> String {
    let (_, health) = daemon.get("/health");
    serde_json::from_str::<Value>(&health).unwrap()["status"].as_str().unwrap().to_owned()
}

fn template(daemon: &Daemon) -> String {
    let (status, props) = daemon.get("/props");
    assert_eq!(status, 200, "{props}");
    serde_json::from_str::<Value>(&props).unwrap()["chat_template"].as_str().unwrap().to_owned()
}

/// Clients ask without a pause while the model is exchanged, by both ways: all get their replies.
#[test]
fn a_reload_costs_nobody_a_reply() {
    // With a bound for the memory there is never room for two.
    for (name, options) in [("beside", &[][..]), ("after", &["--ram", "8G"])] {
        let image = own(&format!("reload-{name}"), false);
        let daemon = Daemon::of(&image, options);
        let story = json!({ "prompt": "Once upon a time", "temperature": 0, "max_tokens": 30 });
        let (alone, _) = daemon.text(&story);
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let clients: Vec<_> = (0..3)
                .map(|_| {
                    scope.spawn(|| {
                        while !done.load(Ordering::Relaxed) {
                            assert_eq!(daemon.text(&story).0, alone, "{name}");
                        }
                    })
                })
                .collect();
            assert!(template(&daemon).contains("Assistant"));
            // As whoever gives out images should: the name is always that of a whole file.
            let new = own(&format!("reload-{name}-new"), true);
            std::fs::rename(new, &image).unwrap();
            daemon.signal(Signal::Reload);
            daemon.until("the new one answers", || template(&daemon).contains("Robot"));
            // What is no image is no reason to stop.
            std::fs::write(&image, "no image").unwrap();
            daemon.signal(Signal::Reload);
            let before = daemon.metric("bitnetd_requests_finished_total");
            daemon.until("it goes on", || daemon.metric("bitnetd_requests_finished_total") > before + 6);
            done.store(true, Ordering::Relaxed);
            clients.into_iter().for_each(|client| client.join().unwrap());
        });
        assert!(template(&daemon).contains("Robot") && daemon.health() == 200);
        assert_eq!(daemon.metric("bitnetd_requests_failed_total"), 0);
        assert_eq!(daemon.metric("bitnetd_requests_refused_total"), 0);
    }
}

#[test]
fn a_model_that_nobody_asks_leaves_and_comes_back() {
    let daemon = Daemon::of(image(), &["--unload-after", "1", "--lazy"]);
    assert_eq!(status(&daemon), "unloaded");
    let story = json!({ "prompt": "Once upon a time", "temperature": 0, "max_tokens": 30 });
    let (alone, _) = daemon.text(&story);
    for _ in 0..2 {
        daemon.until("it leaves", || status(&daemon) == "unloaded");
        // Looking does not bring it back.
        assert_eq!(
            (daemon.get("/metrics").0, daemon.get("/v1/models").0, status(&daemon).as_str()),
            (200, 200, "unloaded")
        );
        // Several at once bring it back once, and all are answered.
        std::thread::scope(|scope| {
            let replies: Vec<_> = (0..4).map(|_| scope.spawn(|| daemon.text(&story).0)).collect();
            replies.into_iter().for_each(|reply| assert_eq!(reply.join().unwrap(), alone));
        });
    }
}

#[test]
fn a_model_that_cannot_come_is_told_and_may_come_later() {
    let image = own("away", false);
    let daemon = Daemon::of(&image, &["--lazy"]);
    let moved = format!("{image}-moved");
    std::fs::rename(&image, &moved).unwrap();
    let story = json!({ "prompt": "Once upon a time", "temperature": 0, "max_tokens": 3 });
    let (code, reply) = daemon.post("/v1/completions", &story);
    assert_eq!(code, 503, "{reply}");
    std::fs::rename(&moved, &image).unwrap();
    assert_eq!(daemon.text(&story).1, "length");
}

/// An order that no request makes, for its bias is of a token that there is not: choosing from it panics. That is its own end and
/// nobody else's.
#[test]
fn a_panic_ends_its_own_reply() {
    let (queue, orders) = Places::new(2, 0).queue();
    let push = |bias| {
        let (events, receiver) = tokio::sync::mpsc::channel(Event::ROOM);
        let arrived = Instant::now();
        let order = Order {
            prompt: vec![1, 300],
            sampling: Sampling::GREEDY,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            bias,
            constraint: None,
            stops: Vec::new(),
            use_cache: true,
            max_tokens: 10,
            logprobs: None,
            arrived,
            deadline: arrived + Duration::from_secs(600),
            events,
        };
        queue.push(order).unwrap();
        receiver
    };
    let (mut poisoned, mut sound) = (push(vec![(u32::MAX, 1.0)]), push(vec![(5, 1.0)]));
    drop(queue);
    let Task::Serve(settings) = Task::new(["bitnetd", "--model", image(), "--threads", "1"]).unwrap() else {
        panic!("it is to serve")
    };
    with_model(&settings.model, |opened| {
        let tokenizer = Tokenizer::load(&opened.image, opened.source)?;
        let room = Room { conversations: 2, cache_bytes: Some(0) };
        engine::run(opened, &tokenizer, room, &orders, (&Metrics::default(), &Pulse::default()), || ())
    })
    .unwrap();
    assert!(poisoned.try_recv().is_err(), "nothing comes of it");
    let events: Vec<Event> = std::iter::from_fn(|| sound.try_recv().ok()).collect();
    assert!(matches!(events.last(), Some(Event::Done(Finish::Length, usage)) if usage.completion == 10), "{events:?}");
}

/// A reply that has begun ends by itself; nobody new is let in.
#[test]
fn a_stop_lets_replies_end() {
    let daemon = Daemon::start(&["--sessions", "2", "--drain-seconds", "600"]);
    let body =
        json!({ "prompt": "Once", "max_tokens": 200, "temperature": 0, "stream": true, "logit_bias": { "2": -100 } });
    let ask = || daemon.send(&request("POST /v1/completions", JSON, &body.to_string()));
    let whole = |mut stream: std::net::TcpStream| {
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text.split("\r\n").filter_map(|line| line.strip_prefix("data: ")).map(str::to_owned).collect::<Vec<_>>()
    };
    let expected = whole(ask()).len();
    let stream = ask();
    daemon.until("it begins", || daemon.metric("bitnetd_requests_active") == 1);
    daemon.signal(Signal::Stop);
    let events = whole(stream);
    assert_eq!(events.len(), expected);
    assert_eq!(events.last().unwrap().trim_end(), "[DONE]");
    daemon.until("nobody listens", || std::net::TcpStream::connect(daemon.address).is_err());
}

/// Replay A-19: threads are as many as may run at once, however many CPUs the machine has.
#[test]
fn one_cpu_gets_one_thread() {
    let started = std::thread::spawn(|| {
        // The threads that this one starts may run there too and nowhere else.
        set_affinity(&affinity().unwrap()[..1]).unwrap();
        Daemon::of(image(), &["--threads", "auto"])
    });
    let daemon = started.join().unwrap();
    let (_, props) = daemon.get("/props");
    assert_eq!(serde_json::from_str::<Value>(&props).unwrap()["threads"], 1, "{props}");
}

/// The kernels are looked at once the daemon serves, and what came of it is told.
#[test]
fn the_self_test_is_told() {
    let daemon = Daemon::start(&[]);
    let told = || serde_json::from_str::<Value>(&daemon.get("/health").1).unwrap()["self_test"].clone();
    daemon.until("the self-test ends", || told() != "running");
    assert_eq!(told(), "passed");
}

#[test]
fn the_doctor_sees_what_is_wrong() {
    let well = |image: &str| {
        let Task::Doctor(settings) = Task::new(["bitnetd", "doctor", "--model", image, "--threads", "1"]).unwrap()
        else {
            panic!("it is to look")
        };
        bitnetd::doctor::run(&settings).unwrap()
    };
    assert!(well(image()));
    let damaged = own("damaged", false);
    let mut bytes = std::fs::read(&damaged).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&damaged, bytes).unwrap();
    assert!(!well(&damaged));
    // Nor does the daemon use it.
    let daemon = Daemon::of(&damaged, &["--lazy"]);
    assert_eq!(daemon.post("/v1/completions", &json!({ "prompt": "Once", "max_tokens": 1 })).0, 503);
    assert!(!well("/nowhere/model.bitnet"));
}
