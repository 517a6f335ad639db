//! Replay A-11: clients that leave, or that stay and read nothing.
use crate::{Daemon, JSON, request};
use serde_json::{Value, json};
use socket2::{Domain, Socket, Type};
use std::io::Read as _;
use std::net::{Shutdown, TcpStream};

const CANCELLED: &str = "bitnetd_requests_cancelled_total";
const GENERATED: &str = "bitnetd_generated_tokens_total";
const READ: &str = "bitnetd_prompt_tokens_read_total";

/// Sends a request, lets the client leave by `leave` once `begun`, and gives how much more of `counted` there was in the end.
fn left(daemon: &Daemon, body: &Value, counted: &str, leave: &dyn Fn(TcpStream)) -> u64 {
    let (before, cancelled) = (daemon.metric(counted), daemon.metric(CANCELLED));
    let stream = daemon.send(&request("POST /v1/completions", JSON, &body.to_string()));
    daemon.until("it begins", || daemon.metric(counted) > before);
    leave(stream);
    daemon.until("it ends", || daemon.metric("bitnetd_requests_active") == 0);
    let count = daemon.metric(counted) - before;
    // One that ended by itself before the client left shows nothing.
    if daemon.metric(CANCELLED) == cancelled { u64::MAX } else { count }
}

#[test]
fn whoever_leaves_costs_no_more() {
    let daemon = Daemon::start(&[]);
    let story = json!({ "prompt": "Once upon a time", "temperature": 0, "max_tokens": 60 });
    let (alone, _) = daemon.text(&story);
    let long = json!({ "prompt": "Once", "max_tokens": 500, "logit_bias": { "2": -100 } });
    let mut streamed = long.clone();
    streamed["stream"] = json!(true);
    let prompt = json!({ "prompt": vec![300; 500], "max_tokens": 1, "stream": true });
    let close: &dyn Fn(TcpStream) = &drop;
    let half: &dyn Fn(TcpStream) = &|mut stream| {
        stream.shutdown(Shutdown::Write).unwrap();
        // Until the daemon closes its half too.
        let _ = stream.read_to_end(&mut Vec::new());
    };
    for (name, body, counted, all) in
        [("a stream", streamed, GENERATED, 500), ("a reply", long, GENERATED, 500), ("a prompt", prompt, READ, 500)]
    {
        for leave in [close, half] {
            // A machine that is busy may see the client leave late: once of several times is enough to tell.
            let seen: Vec<u64> = (0..5).map(|_| left(&daemon, &body, counted, leave)).collect();
            assert!(seen.iter().any(|&count| count < all), "{name} goes on: {seen:?}");
        }
    }
    assert_eq!(daemon.text(&story).0, alone);
}

#[test]
fn whoever_reads_nothing_waits_and_is_cut_off() {
    let daemon = Daemon::start(&["--stall-seconds", "1", "--sessions", "2"]);
    // Buffers as small as a client can have them: the system's would take megabytes. The sender's follow the size of segments.
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    socket.set_tcp_mss(536).unwrap();
    socket.connect(&daemon.address.into()).unwrap();
    // Alternatives of every token fill them.
    let body =
        json!({ "prompt": "Once", "max_tokens": 500, "stream": true, "logprobs": 20, "logit_bias": { "2": -100 } });
    socket.send(&request("POST /v1/completions", JSON, &body.to_string())).unwrap();
    daemon.until("it is cut off", || daemon.metric(CANCELLED) == 1);
    daemon.until("it ends", || daemon.metric("bitnetd_requests_active") == 0);
    let story = json!({ "prompt": "Once upon a time", "temperature": 0, "max_tokens": 10 });
    assert!(daemon.text(&story).0.starts_with(", there was"));
    drop(socket);
}
