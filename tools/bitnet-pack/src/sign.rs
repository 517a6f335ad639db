//! Keys and signatures of images: see [`bitnet_host::signature`].
use crate::error::Error;
use crate::files::Input;
use crate::report::Progress;
use crate::verify::verify_with;
use bitnet_host::signature::{self, SecretKey, Signed};
use std::fs::OpenOptions;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use tempfile::NamedTempFile;

/// Makes a pair of keys: the private one at `path`, the public one beside it, at the path that is returned.
///
/// # Errors
/// If one of the two is there already, or cannot be written.
pub fn keygen(path: &Path) -> Result<PathBuf, Error> {
    let mut seed = [0; 32];
    getrandom::fill(&mut seed).map_err(|e| Error::Signature(format!("the system gives no random bytes: {e}")))?;
    let (secret, public) = SecretKey::from_seed(&seed).to_pem().map_err(wrong)?;
    let beside = path.with_extension("pub.pem");
    create(path, 0o600, &secret)?;
    create(&beside, 0o644, &public).inspect_err(|_| {
        let _ = std::fs::remove_file(path);
    })?;
    Ok(beside)
}

fn create(path: &Path, mode: u32, text: &str) -> Result<(), Error> {
    let file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path);
    let written = file.and_then(|mut file| {
        file.write_all(text.as_bytes())?;
        file.sync_all()
    });
    written.map_err(|e| Error::io(path, "create", e))
}

/// Verifies an image and signs it; the signature is written beside it, at the path that is returned.
///
/// # Errors
/// If the image is not sound, the key is not one, or a file cannot be read or written.
pub fn sign(image: &Path, key: &Path, progress: &mut dyn Progress) -> Result<PathBuf, Error> {
    let key = SecretKey::read(key).map_err(wrong)?;
    verify_with(image, progress)?;
    let signature = key.sign(&Input::open(image)?.file).map_err(wrong)?;
    let path = signature::path(image);
    let folder = image.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let write = || {
        let mut file = NamedTempFile::new_in(folder)?;
        file.write_all(&signature)?;
        file.as_file().set_permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644))?;
        file.as_file().sync_all()?;
        file.persist(&path)?;
        Ok(())
    };
    write().map_err(|e| Error::io(&path, "write", e))?;
    Ok(path)
}

/// Compares every byte of an image with the signature beside it.
///
/// # Errors
/// If they disagree, or one of the files is not what it should be.
pub fn check(image: &Path, public_key: &Path) -> Result<(), Error> {
    let signed = Signed::read(public_key, image).map_err(wrong)?;
    let checked = signed.check_file(&[], &Input::open(image)?.file);
    checked.map_err(|e| Error::Signature(format!("{}: {e:#}", image.display())))
}

fn wrong(e: impl std::fmt::Display) -> Error {
    Error::Signature(format!("{e:#}"))
}
