//! Many clients for a while, of whom a third leaves. `cargo xtask soak` is the same for longer, with the daemon in a process of its own.
use crate::{Daemon, JSON, request};
use serde_json::{Value, json};
use std::io::Read as _;
use std::time::{Duration, Instant};

const CLIENTS: u64 = 8;

/// Requests of mixed lengths, drawn and greedy.
fn bodies() -> Vec<Value> {
    let prompts = [
        "Once upon a time",
        "The cat",
        "Lily and Tom went to the park, and there they saw a very big dog. The dog",
        "One day",
    ];
    let body = |i: usize| {
        let (temperature, tokens) = (i % 3, [3, 40, 12, 90][i % 4]);
        json!({ "prompt": prompts[i / 3 % 4].repeat(1 + i / 6), "temperature": temperature, "seed": i, "max_tokens": tokens })
    };
    (0..12).map(body).collect()
}

#[test]
fn soak() {
    let requests = std::env::var("BITNETD_SOAK_REQUESTS").map_or(96, |n| n.parse().unwrap());
    let program = std::env::var("BITNETD_PROGRAM").ok();
    let daemon = program.as_deref().map_or_else(|| Daemon::start(&[]), Daemon::spawn);
    let bodies = bodies();
    let alone: Vec<String> = bodies.iter().map(|body| daemon.text(body).0).collect();
    let memory = || daemon.metric("process_resident_memory_bytes");
    let round = |requests: u64| {
        std::thread::scope(|scope| {
            for client in 0..CLIENTS {
                let (bodies, alone, daemon) = (&bodies, &alone, &daemon);
                scope.spawn(move || {
                    for i in 0..requests / CLIENTS {
                        // Any numbers do, as long as they look like none.
                        let number = (client * 1_000 + i).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33;
                        let which = (number % 12) as usize;
                        if number / 12 % 3 == 0 {
                            let mut body = bodies[which].clone();
                            (body["stream"], body["max_tokens"]) = (json!(true), json!(400));
                            let mut stream = daemon.send(&request("POST /v1/completions", JSON, &body.to_string()));
                            let _ = stream.read(&mut vec![0; (number / 36 % 2_000) as usize]);
                        } else {
                            assert_eq!(daemon.text(&bodies[which]).0, alone[which], "request {which}");
                        }
                    }
                });
            }
        });
    };
    round(requests / 4);
    let before = memory();
    round(requests);
    daemon.until("all end", || daemon.metric("bitnetd_requests_active") == 0);
    let after = memory();
    assert_eq!(daemon.metric("bitnetd_requests_failed_total"), 0);
    assert!(daemon.metric("bitnetd_requests_cancelled_total") > 0);
    println!("{requests} requests, memory before {before} and after {after} bytes");
    let Some(program) = program else { return };
    assert!(after as f64 <= 1.01 * before as f64, "memory grows from {before} to {after} bytes");
    drop(daemon);
    let start = Instant::now();
    let daemon = Daemon::spawn(&program);
    println!("ready {:?} after it was killed", start.elapsed());
    assert!(start.elapsed() < Duration::from_secs(10));
    assert_eq!(daemon.text(&bodies[0]).0, alone[0]);
}
