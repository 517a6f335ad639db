//! What the service manager is told: sd_notify(3). Without one, nobody hears it.
use sd_notify::NotifyState;
use std::time::Duration;

fn send(states: &[NotifyState<'_>]) {
    // Whether it is heard is not ours to act on.
    let _ = sd_notify::notify(states);
}

/// Requests are answered.
pub(crate) fn ready() {
    send(&[NotifyState::Ready]);
}

/// What is configured is being read anew, since now; [`ready`] ends it.
pub(crate) fn reloading() {
    match NotifyState::monotonic_usec_now() {
        Ok(now) => send(&[NotifyState::Reloading, now]),
        Err(_) => send(&[NotifyState::Reloading]),
    }
}

/// The last replies are given.
pub(crate) fn stopping() {
    send(&[NotifyState::Stopping]);
}

/// Work goes on.
pub(crate) fn alive() {
    send(&[NotifyState::Watchdog]);
}

/// How often the watchdog wants to hear, twice in its time, if there is one.
pub(crate) fn watchdog_interval() -> Option<Duration> {
    sd_notify::watchdog_enabled().map(|time| (time / 2).max(Duration::from_millis(1)))
}
