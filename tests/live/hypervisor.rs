//! The private libvirtd of the tests.

use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// The exit status of an environment that is not available.
const SKIPPED: i32 = 75;

/// Tests run one at a time, because a small machine has two processors. Other processes of this
/// checkout wait too.
static ONE_AT_A_TIME: Mutex<Option<File>> = Mutex::new(None);

/// A libvirtd that answers.
#[derive(Debug)]
pub struct Hypervisor {
    /// The URI for `virsh -c` and `virConnectOpen`.
    pub uri: String,
    /// The directory of sockets and of the guests' files. It is short, because a socket's path is
    /// limited to 107 bytes.
    run: PathBuf,
    _turn: MutexGuard<'static, Option<File>>,
}

impl Hypervisor {
    /// Starts the environment if it does not run, and removes domains of an earlier run. Returns
    /// `None`, with a message, if the environment is not available.
    pub fn get() -> Option<Self> {
        static FOUND: OnceLock<Result<(String, PathBuf), String>> = OnceLock::new();
        let mut turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        turn.get_or_insert_with(other_processes);
        match FOUND.get_or_init(find) {
            Ok((uri, run)) => {
                let hypervisor = Self { uri: uri.clone(), run: run.clone(), _turn: turn };
                hypervisor.clear();
                Some(hypervisor)
            }
            Err(reason) => {
                let required = std::env::var("QCOW2_CHAIN_REQUIRE_LIVE").is_ok_and(|value| value == "1");
                assert!(!required, "QCOW2_CHAIN_REQUIRE_LIVE=1, and {reason}");
                // `eprintln!` would be captured while the test passes.
                let _ = writeln!(std::io::stderr(), "\n!!! {reason}");
                None
            }
        }
    }

    /// Creates a directory for a guest's sockets and logs.
    pub fn run_directory(&self, name: &str) -> PathBuf {
        let directory = self.run.join("guests").join(name);
        std::fs::create_dir_all(&directory).unwrap();
        directory
    }

    /// Runs virsh and returns its output. A failure fails the test.
    pub fn virsh<S: AsRef<str>>(&self, arguments: &[S]) -> String {
        self.try_virsh(arguments).unwrap_or_else(|error| {
            let arguments: Vec<&str> = arguments.iter().map(AsRef::as_ref).collect();
            panic!("virsh {}: {error}", arguments.join(" "))
        })
    }

    /// Runs virsh and returns its output, or its error message.
    pub fn try_virsh<S: AsRef<str>>(&self, arguments: &[S]) -> Result<String, String> {
        let output = Command::new("virsh")
            .args(["--quiet", "--connect", &self.uri])
            .args(arguments.iter().map(AsRef::as_ref))
            .env("LC_ALL", "C")
            .output()
            .unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
        if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
    }

    /// Returns the domain's state, such as `running` or `shut off`; `None` if there is no such
    /// domain.
    pub fn state(&self, domain: &str) -> Option<String> {
        self.try_virsh(&["domstate", domain]).ok()
    }

    /// Makes libvirtd hang until the returned guard is dropped.
    pub fn pause(&self) -> Paused {
        let output = environment("pause");
        assert!(output.status.success(), "{output:?}");
        Paused
    }

    /// Kills libvirtd, and waits until another one answers. Guests continue to run.
    pub fn restart(&self) {
        let output = environment("restart");
        assert!(output.status.success(), "{output:?}");
    }

    fn clear(&self) {
        for domain in self.virsh(&["list", "--all", "--name"]).lines().filter(|line| !line.is_empty()) {
            let _ = self.try_virsh(&["destroy", domain]);
            let _ = self.try_virsh(&["undefine", domain]);
        }
        let _ = std::fs::remove_dir_all(self.run.join("guests"));
    }
}

/// A libvirtd that hangs. It continues when this is dropped.
#[derive(Debug)]
pub struct Paused;

impl Drop for Paused {
    fn drop(&mut self) {
        environment("resume");
    }
}

/// Waits for other test processes of this checkout, which would remove each other's domains.
fn other_processes() -> File {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/live");
    std::fs::create_dir_all(&directory).unwrap();
    let lock = File::create(directory.join("lock")).unwrap();
    lock.lock().unwrap();
    lock
}

fn find() -> Result<(String, PathBuf), String> {
    let started = environment("start");
    let said = String::from_utf8_lossy(&started.stdout).trim().to_owned();
    match started.status.code() {
        Some(0) => {}
        Some(SKIPPED) => return Err(said),
        code => panic!("tests/live/environment start: {code:?} {said} {}", String::from_utf8_lossy(&started.stderr)),
    }
    let line = |verb| String::from_utf8(environment(verb).stdout).unwrap().trim().to_owned();
    Ok((line("uri"), PathBuf::from(line("run"))))
}

fn environment(verb: &str) -> Output {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    Command::new(root.join("tests/live/environment")).arg(verb).output().unwrap()
}

/// Polls until there is a value. None within the limit fails the test.
pub fn wait_for<T>(what: &str, limit: Duration, mut ask: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(start.elapsed() < limit, "{what}: not within {limit:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Runs a program and returns its output. A failure fails the test.
pub fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(
        output.status.success(),
        "{program} {}: {}\n{}{}",
        arguments.join(" "),
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}
