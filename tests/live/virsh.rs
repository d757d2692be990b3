//! A hypervisor seam by virsh, for trying.
use qcow2_chain::live::*;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

#[derive(Debug)]
pub struct Virsh {
    pub uri: String,
    pub domain: String,
}
type R<T> = Result<T, HypervisorError>;
impl Virsh {
    fn run(&self, args: &[&str]) -> R<String> {
        let output = Command::new("virsh").args(["-q", "-c", &self.uri]).args(args).output().unwrap();
        let text = |b: &[u8]| String::from_utf8_lossy(b).trim().to_owned();
        if output.status.success() {
            return Ok(text(&output.stdout));
        }
        let e = text(&output.stderr);
        eprintln!("virsh {args:?}: {e}");
        let kind = if e.contains("domain is not running") || e.contains("failed to get domain") {
            FailureKind::Gone
        } else if e.contains("agent is not") {
            FailureKind::NoAgent
        } else if e.contains("agent") {
            FailureKind::AgentTimeout
        } else {
            FailureKind::Failed
        };
        Err(HypervisorError::new(kind, e))
    }
}
impl Hypervisor for Virsh {
    fn describe(&self) -> R<Description> {
        let running = self.run(&["domstate", &self.domain])? == "running";
        let xml = self.run(&["dumpxml", &self.domain])?;
        let document = roxmltree::Document::parse(&xml).unwrap();
        let mut disks = Vec::new();
        for disk in document.descendants().filter(|n| n.has_tag_name("disk")) {
            let child =
                |n: roxmltree::Node<'_, '_>, name: &str| n.children().find(|c| c.has_tag_name(name)).map(|c| c.id());
            let get = |id| document.get_node(id).unwrap();
            let name = get(child(disk, "target").unwrap()).attribute("dev").unwrap().to_owned();
            let mut files = Vec::new();
            let mut next = Some(disk);
            while let Some(node) = next {
                if let Some(source) = child(node, "source") {
                    files.push(DiskFile { path: PathBuf::from(get(source).attribute("file").unwrap()), format: None });
                }
                next = child(node, "backingStore").map(get);
            }
            let mirror = child(disk, "mirror").map(get).map(|m| Mirror {
                path: PathBuf::from(m.attribute("file").unwrap()),
                ready: m.attribute("ready") == Some("yes"),
            });
            disks.push(Disk { name, files, mirror });
        }
        Ok(Description { running, disks })
    }
    fn snapshot(&self, disks: &[NewTop], quiesce: bool) -> R<()> {
        let mut args: Vec<String> =
            ["snapshot-create-as", &self.domain, "s", "--disk-only", "--atomic", "--no-metadata", "--reuse-external"]
                .map(str::to_owned)
                .to_vec();
        if quiesce {
            args.push("--quiesce".into());
        }
        for top in disks {
            args.extend([
                "--diskspec".to_owned(),
                format!("{},snapshot=external,file={}", top.disk, top.file.display()),
            ]);
        }
        self.run(&args.iter().map(String::as_str).collect::<Vec<_>>()).map(drop)
    }
    fn set_agent_timeout(&self, at_most: Duration) -> R<()> {
        self.run(&["guest-agent-timeout", &self.domain, "--timeout", &at_most.as_secs().to_string()]).map(drop)
    }
    fn thaw(&self) -> R<()> {
        self.run(&["domfsthaw", &self.domain]).map(drop)
    }
    fn commit(&self, c: &Commit) -> R<()> {
        let (top, base, rate) =
            (c.top.display().to_string(), c.base.display().to_string(), c.rate_limit.unwrap_or(0).to_string());
        let mut args =
            vec!["blockcommit", &self.domain, &c.disk, "--base", &base, "--async", "--bytes", "--bandwidth", &rate];
        if c.active {
            args.push("--active");
        } else {
            args.extend(["--top", &top]);
        }
        // returns once started
        self.run(&args.into_iter().filter(|a| *a != "--async").collect::<Vec<_>>()).map(drop)
    }
    fn job(&self, disk: &str) -> R<Option<Job>> {
        let text = self.run(&["blockjob", &self.domain, disk, "--info", "--raw"])?;
        let field =
            |name: &str| text.lines().find_map(|l| l.trim().strip_prefix(name)?.strip_prefix('=').map(str::to_owned));
        let Some(kind) = field("type") else { return Ok(None) };
        let kind = match kind.as_str() {
            "Active Block Commit" => JobKind::ActiveCommit,
            "Block Commit" => JobKind::Commit,
            _ => JobKind::Other,
        };
        Ok(Some(Job {
            kind,
            done: field("cur").unwrap().parse().unwrap(),
            total: field("end").unwrap().parse().unwrap(),
        }))
    }
    fn abort(&self, disk: &str) -> R<()> {
        self.run(&["blockjob", &self.domain, disk, "--abort"]).map(drop)
    }
    fn pivot(&self, disk: &str) -> R<()> {
        self.run(&["blockjob", &self.domain, disk, "--pivot"]).map(drop)
    }
    fn resize(&self, disk: &str, size: u64) -> R<()> {
        self.run(&["blockresize", &self.domain, disk, &format!("{size}B")]).map(drop)
    }
    fn wait(&self, _disk: &str, at_most: Duration) -> Option<Event> {
        std::thread::sleep(at_most);
        None
    }
}
