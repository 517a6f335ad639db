//! Signatures of images: Ed25519 (RFC 8032) over every byte of the file, in a file of 64 bytes beside it.
//!
//! The checksums inside an image find damage and not malice, since XXH3 is easily forged; so what is signed is the whole file
//! and not its header. It is plain Ed25519 and not the variant that signs a digest: OpenSSL makes and checks the same signatures
//! (`openssl pkeyutl -sign -rawin`). Keys are PEM files as `openssl genpkey -algorithm ed25519` writes them.
use anyhow::{Context as _, anyhow, ensure};
use ed25519_dalek::hazmat::{ExpandedSecretKey, raw_sign_byupdate};
use ed25519_dalek::pkcs8::spki::der::pem::LineEnding;
use ed25519_dalek::pkcs8::{DecodePrivateKey as _, DecodePublicKey as _, EncodePrivateKey as _, EncodePublicKey as _};
use ed25519_dalek::{Signature, SignatureError, SigningKey, StreamVerifier, VerifyingKey};
use sha2::{Digest as _, Sha512};
use std::cell::RefCell;
use std::ffi::OsString;
use std::fmt;
use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};

/// Most bytes of a key's file: PEM of Ed25519 has some 120, and texts may stand before it.
const KEY_BYTES_MAX: u64 = 16 << 10;
/// Bytes of an image that are read at once.
const CHUNK: usize = 1 << 18;

/// Where the signature of an image lies: `IMAGE.sig`.
pub fn path(image: &Path) -> PathBuf {
    let mut name = OsString::from(image);
    name.push(".sig");
    name.into()
}

/// A key that signs.
#[derive(Debug)]
pub struct SecretKey(SigningKey);

impl SecretKey {
    /// From 32 bytes, which nobody else may know.
    pub fn from_seed(seed: &[u8; 32]) -> Self {
        Self(SigningKey::from_bytes(seed))
    }
    /// Reads a private key: PKCS #8 in PEM.
    ///
    /// # Errors
    /// If the file cannot be read, or is something else, which is named.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let text = pem(path)?;
        let key = SigningKey::from_pkcs8_pem(&text).map_err(|e| no_key(&text, "PRIVATE KEY", &e));
        key.map(Self).with_context(|| path.display().to_string())
    }
    /// The private and the public key in PEM.
    ///
    /// # Errors
    /// None that is known.
    pub fn to_pem(&self) -> anyhow::Result<(String, String)> {
        // Without the public key beside it, as OpenSSL writes it: OpenSSL 1.1 reads no other.
        let pair = ed25519_dalek::pkcs8::KeypairBytes { secret_key: self.0.to_bytes(), public_key: None };
        let secret = pair.to_pkcs8_pem(LineEnding::LF).map_err(|e| anyhow!("{e}"))?;
        let public = self.0.verifying_key().to_public_key_pem(LineEnding::LF).map_err(|e| anyhow!("{e}"))?;
        Ok((secret.to_string(), public))
    }
    /// The signature of a whole file, which is read twice, as Ed25519 wants.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn sign(&self, file: &File) -> anyhow::Result<[u8; 64]> {
        let expanded = ExpandedSecretKey::from(&self.0.to_bytes());
        let failed = RefCell::new(None);
        let all = |hash: &mut Sha512| {
            chunks(file, 0, |bytes| hash.update(bytes)).map_err(|e| {
                *failed.borrow_mut() = Some(e);
                SignatureError::new()
            })
        };
        let signed = raw_sign_byupdate::<Sha512, _>(&expanded, all, &self.0.verifying_key());
        match (signed, failed.take()) {
            (Ok(signature), None) => Ok(signature.to_bytes()),
            (_, Some(e)) => Err(e.into()),
            (Err(e), None) => Err(anyhow!("{e}")),
        }
    }
}

/// A signature and the key that must have made it. Nothing has been compared yet.
pub struct Signed {
    signature: Signature,
    key: VerifyingKey,
}

impl fmt::Debug for Signed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Signed").finish_non_exhaustive()
    }
}

impl Signed {
    /// Reads a public key in PEM and the signature that lies beside an image.
    ///
    /// # Errors
    /// If one of the files cannot be read, or is something else, which is named.
    pub fn read(key: &Path, image: &Path) -> anyhow::Result<Self> {
        let text = pem(key)?;
        let public = VerifyingKey::from_public_key_pem(&text).map_err(|e| no_key(&text, "PUBLIC KEY", &e));
        let public = public.with_context(|| key.display().to_string())?;
        ensure!(!public.is_weak(), "{}: whoever likes can sign for this key", key.display());
        let beside = path(image);
        let bytes = small(&beside).context("the image needs a signature (bitnet-pack sign makes one)")?;
        let name = beside.display();
        let signature = Signature::from_slice(&bytes)
            .map_err(|_| anyhow!("{name}: {} bytes, and a signature has {}", bytes.len(), Signature::BYTE_SIZE))?;
        let signed = Self { signature, key: public };
        signed.begin().with_context(|| format!("{name}"))?;
        Ok(signed)
    }
    /// Whether `start` and what the file has after so many bytes are what was signed.
    ///
    /// # Errors
    /// If they are not, or the file cannot be read.
    pub fn check_file(&self, start: &[u8], file: &File) -> anyhow::Result<()> {
        let mut check = self.begin()?;
        check.update(start);
        chunks(file, start.len() as u64, |bytes| check.update(bytes))?;
        end(check)
    }
    /// Whether `start` and `rest` are what was signed.
    ///
    /// # Errors
    /// If they are not.
    pub fn check(&self, start: &[u8], rest: &[u8]) -> anyhow::Result<()> {
        let mut check = self.begin()?;
        check.update(start);
        check.update(rest);
        end(check)
    }
    fn begin(&self) -> anyhow::Result<StreamVerifier> {
        self.key.verify_stream(&self.signature).map_err(|_| anyhow!("64 bytes that are no signature of Ed25519"))
    }
}

fn end(check: StreamVerifier) -> anyhow::Result<()> {
    check.finalize_and_verify().map_err(|_| {
        anyhow!("the signature is not that of this image by this key: one of the three was changed or is another's")
    })
}

/// All of a file from `start` on, piece by piece.
fn chunks(mut file: &File, start: u64, mut each: impl FnMut(&[u8])) -> io::Result<()> {
    file.seek(SeekFrom::Start(start))?;
    let mut buffer = vec![0; CHUNK];
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(n) => each(&buffer[..n]),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

/// The whole of a small regular file; anything else could block or have no end.
fn small(path: &Path) -> anyhow::Result<Vec<u8>> {
    let name = path.display();
    ensure!(std::fs::metadata(path).with_context(|| format!("{name}"))?.is_file(), "{name} is not a regular file");
    let mut bytes = Vec::new();
    let file = File::open(path).with_context(|| format!("{name}"))?;
    file.take(KEY_BYTES_MAX + 1).read_to_end(&mut bytes).with_context(|| format!("{name}"))?;
    ensure!(bytes.len() as u64 <= KEY_BYTES_MAX, "{name}: more than {KEY_BYTES_MAX} bytes, so no key and no signature");
    Ok(bytes)
}

fn pem(path: &Path) -> anyhow::Result<String> {
    String::from_utf8(small(path)?).map_err(|_| anyhow!("{}: not a key in PEM", path.display()))
}

/// What is in a file that should hold a key.
fn no_key(text: &str, expected: &str, error: &dyn fmt::Display) -> anyhow::Error {
    let label = text.split_once("-----BEGIN ").and_then(|(_, rest)| rest.split_once("-----"));
    match label.map(|(label, _)| label) {
        None => anyhow!("not a key in PEM"),
        Some(label) if label == expected => anyhow!("not an Ed25519 key ({error})"),
        Some("PRIVATE KEY") => {
            anyhow!("a private key, where the public one is expected (openssl pkey -in KEY -pubout)")
        }
        Some("PUBLIC KEY") => anyhow!("a public key, where the private one is expected"),
        Some("ENCRYPTED PRIVATE KEY") if expected == "PRIVATE KEY" => {
            anyhow!("an encrypted key; take the cipher off first (openssl pkey -in KEY)")
        }
        Some(label) => anyhow!("`{label}`, where `{expected}` is expected, as OpenSSL writes it"),
    }
}

#[cfg(test)]
mod tests;
