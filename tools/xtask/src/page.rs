//! The daemon's chat page in headless Chromium.

use std::process::Command;

use anyhow::{Context, Result};

use crate::clients::{self, succeed};
use crate::workspace::Workspace;

const PACKAGES: [&str; 2] = ["puppeteer-core@25.16.0", "axe-core@4.14.1"];
const SUITE: &str = "boards/bitnetd/tests/page/page.mjs";

/// Programs that are Chromium, in this order.
const BROWSERS: [&str; 3] = ["chromium", "chromium-headless-shell", "google-chrome"];

/// Starts a daemon whose conversations have no end, and does with its page what people do; pictures are kept.
pub(crate) fn run(workspace: &Workspace) -> Result<bool> {
    let folder = workspace.target.join("page");
    std::fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
    // The driver starts a file and looks for no program by its name.
    let path = std::env::var_os("PATH").unwrap_or_default();
    let browser = BROWSERS
        .iter()
        .find_map(|name| std::env::split_paths(&path).map(|folder| folder.join(name)).find(|file| file.is_file()));
    let browser = browser.context("there is no Chromium; on Debian: apt-get install chromium")?;
    succeed(Command::new("npm").args(["install", "--silent", "--prefix"]).arg(&folder).args(PACKAGES))?;
    let daemon = clients::start(workspace, &folder, clients::Checkpoint::Stateful)?;
    let mut suite = Command::new("node");
    suite.arg(workspace.root.join(SUITE)).arg(&folder).arg(browser).arg(&daemon.url).arg(&folder);
    let passed = suite.status().context("starting node")?.success();
    say!("pictures: {}", folder.display());
    Ok(passed)
}
