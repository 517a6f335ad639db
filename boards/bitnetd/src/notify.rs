//! What systemd is told: sd_notify(3), a datagram to the socket that it names.
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

/// Tells whoever started the daemon, if they want to know.
pub(crate) fn send(state: &str) {
    let Ok(path) = std::env::var("NOTIFY_SOCKET") else { return };
    let address = match path.strip_prefix('@') {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(&path),
    };
    // Whether it is heard is not ours to act on.
    if let (Ok(address), Ok(socket)) = (address, UnixDatagram::unbound()) {
        let _ = socket.send_to_addr(state.as_bytes(), &address);
    }
}

/// How often the watchdog wants to hear: twice in its time, or once a minute where there is none.
pub(crate) fn watchdog_interval() -> Duration {
    let microseconds = std::env::var("WATCHDOG_USEC").ok().and_then(|text| text.parse().ok());
    Duration::from_micros(microseconds.unwrap_or(120_000_000).max(2000) / 2)
}
