//! The chat page: whole in itself, and held to that.
use crate::{Daemon, request};

#[test]
fn the_page_asks_for_nothing_from_outside() {
    let daemon = Daemon::start(&["--allow-host", "pi.local"]);
    let mut answer = String::new();
    let mut stream = daemon.send(&request("GET /", "Host: pi.local\r\n", ""));
    std::io::Read::read_to_string(&mut stream, &mut answer).unwrap();
    let (head, page) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200") && head.contains("content-type: text/html; charset=utf-8"), "{head}");
    let policy = head.lines().find_map(|line| line.strip_prefix("content-security-policy: ")).unwrap();
    for part in [
        "default-src 'none'",
        "script-src 'sha256-",
        "style-src 'sha256-",
        "connect-src 'self'",
        "frame-ancestors 'none'",
    ] {
        assert!(policy.contains(part), "{part} in {policy}");
    }
    assert!(!policy.contains("unsafe"), "{policy}");
    assert!(
        head.contains("x-content-type-options: nosniff") && head.contains("referrer-policy: no-referrer"),
        "{head}"
    );
    for outside in ["http:", "https:", "//cdn", "src=", "@import", "url(", "innerHTML", " style=", "onclick"] {
        assert!(!page.contains(outside), "{outside}");
    }
    // Every field has a label, and every path that is asked for is there.
    for field in page.split("<input id=\"").skip(1).chain(page.split("<textarea id=\"").skip(1)) {
        let id = field.split('"').next().unwrap();
        assert!(page.contains(&format!("<label for=\"{id}\"")), "{id}");
    }
    for path in ["/props", "/metrics", "/v1/chat/completions", "/v1/completions"] {
        assert!(page.contains(&format!("\"{path}\"")) && bitnetd::ROUTES.contains(&path), "{path}");
    }
}
