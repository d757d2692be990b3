//! Runs the program with a time limit, and kills it at chosen moments.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{Read as _, Seek as _};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// The longest that any command may take.
const LIMIT: Duration = Duration::from_secs(60);

/// The conditions under which the program is started.
#[derive(Clone, Debug)]
pub struct Caller {
    pub binary: PathBuf,
    /// The working directory of the process.
    pub cwd: PathBuf,
    /// The user and group of the process, if not those of the test.
    pub user: Option<(u32, u32)>,
}

/// The result of one command.
#[derive(Clone, Debug)]
pub struct Run {
    /// The exit code, or `None` after a signal.
    pub code: Option<i32>,
    pub stdout: String,
    /// The standard output as it is.
    pub bytes: Vec<u8>,
    pub stderr: String,
    pub time: Duration,
}

impl Run {
    /// Returns `true` if the command ended with exit code 0.
    pub fn done(&self) -> bool {
        self.code == Some(0)
    }
}

impl Caller {
    /// Runs a `vm` verb to its end.
    pub fn run(&self, args: &[OsString]) -> Run {
        let run = self.start(args, None);
        assert!(run.code.is_some(), "{}: killed by a signal: {}", render(args), run.stderr);
        run
    }

    /// Runs a `vm` verb and kills it with SIGKILL after `delay`, unless it ends before.
    pub fn run_killed(&self, args: &[OsString], delay: Duration) -> Run {
        self.start(args, Some(delay))
    }

    fn start(&self, args: &[OsString], kill_after: Option<Duration>) -> Run {
        let [mut stdout, mut stderr] = [(); 2].map(|()| tempfile::tempfile().expect("a file for output"));
        let copy = |file: &File| Stdio::from(file.try_clone().expect("a descriptor"));
        let mut command = Command::new(&self.binary);
        command.arg("vm").args(args).current_dir(&self.cwd).env("TZ", "UTC");
        command.stdin(Stdio::null()).stdout(copy(&stdout)).stderr(copy(&stderr));
        if let Some((user, group)) = self.user {
            command.uid(user).gid(group);
        }
        let begun = Instant::now();
        // A process that another thread forks holds the new copy of the program open for an instant.
        let mut spawned = command.spawn();
        while spawned.as_ref().is_err_and(|error| error.kind() == std::io::ErrorKind::ExecutableFileBusy)
            && begun.elapsed() < Duration::from_secs(10)
        {
            std::thread::sleep(Duration::from_millis(10));
            spawned = command.spawn();
        }
        let mut child = spawned.unwrap_or_else(|error| panic!("{}: {error}", self.binary.display()));
        let status = wait(&mut child, begun, kill_after, args);
        let (bytes, errors) = (read(&mut stdout), read(&mut stderr));
        let [stdout, stderr] = [&bytes, &errors].map(|bytes| String::from_utf8_lossy(bytes).into_owned());
        let run = Run { code: status.code(), stdout, bytes, stderr, time: begun.elapsed() };
        run.judge(args, status);
        run
    }
}

impl Run {
    /// Fails the test on a panic or an exit code that the program does not have.
    fn judge(&self, args: &[OsString], status: ExitStatus) {
        assert!(!self.stderr.contains("panicked"), "{}: {}", render(args), self.stderr);
        let verify = args.first().is_some_and(|verb| verb == "verify");
        let known = match self.code {
            Some(0 | 1 | 130) => true,
            // Problems; and, before the exit codes 2 and 3 were joined, leaks.
            Some(2 | 3) => verify,
            Some(_) => false,
            None => status.signal() == Some(9),
        };
        assert!(known, "{}: {status}: {}{}", render(args), self.stdout, self.stderr);
    }
}

/// Waits for a child; ends it after `kill_after`. A child that exceeds the time limit fails the
/// test.
fn wait(child: &mut Child, begun: Instant, kill_after: Option<Duration>, args: &[OsString]) -> ExitStatus {
    if let Some(delay) = kill_after {
        std::thread::sleep(delay.saturating_sub(begun.elapsed()));
        let _ = child.kill();
        return child.wait().expect("the child is waited for");
    }
    loop {
        if let Some(status) = child.try_wait().expect("the child is waited for") {
            return status;
        }
        if begun.elapsed() > LIMIT {
            let _ = child.kill();
            let _ = child.wait();
            panic!("{}: no end after {LIMIT:?}", render(args));
        }
        std::thread::sleep(Duration::from_micros(if begun.elapsed().as_millis() < 200 { 300 } else { 5000 }));
    }
}

fn read(file: &mut File) -> Vec<u8> {
    let mut bytes = Vec::new();
    file.rewind().and_then(|()| file.read_to_end(&mut bytes)).expect("the output is read");
    bytes
}

/// Converts words and paths to arguments.
pub fn args<S: AsRef<OsStr>>(words: &[S]) -> Vec<OsString> {
    words.iter().map(|word| word.as_ref().to_owned()).collect()
}

/// Renders arguments for messages.
pub fn render(args: &[OsString]) -> String {
    args.iter().map(|arg| arg.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
}

/// Runs a tool of the system and returns its standard output, or `None` if it is missing or fails.
pub fn tool(name: &str, args: &[&OsStr]) -> Option<String> {
    let output = Command::new(name).args(args).stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Returns `true` if this process may change owners and mount file systems.
pub fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt as _;
    std::fs::metadata("/proc/self").is_ok_and(|own| own.uid() == 0)
}

/// Gives a file or directory another owner and mode.
pub fn give(path: &Path, owner: (u32, u32), mode: u32) {
    use std::os::unix::fs::{PermissionsExt as _, chown};
    chown(path, Some(owner.0), Some(owner.1)).expect("the owner is changed");
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).expect("the mode is changed");
}
