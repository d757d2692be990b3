//! A domain with the guest of `tests/live/environment guest`.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io::{BufRead, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::hypervisor::{Hypervisor, wait_for};
use crate::lab::{chain, text};

/// The limit for a boot under TCG on a busy machine.
const BOOT: Duration = Duration::from_secs(90);
const SHORT: Duration = Duration::from_secs(30);

/// The state of the guest agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Agent {
    /// The agent answers.
    Running,
    /// The domain has a channel, but the agent does not run.
    Absent,
    /// The domain has no channel.
    NotConfigured,
}

/// A record that the guest has fsynced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    pub serial: String,
    pub number: u64,
}

/// A domain, which is destroyed and undefined when it is dropped.
#[derive(Debug)]
pub struct Guest<'h> {
    hypervisor: &'h Hypervisor,
    pub name: String,
    agent: Agent,
    directory: PathBuf,
    control: Option<BufReader<UnixStream>>,
    boots: usize,
}

impl<'h> Guest<'h> {
    /// Defines a domain with these disks: target, such as `vda`, and active image. The target is
    /// also the serial number, by which the guest names the disk.
    pub fn define(hypervisor: &'h Hypervisor, name: &str, agent: Agent, disks: &[(&str, &Path)]) -> Self {
        let directory = hypervisor.run_directory(name);
        let guest = Self { hypervisor, name: name.to_owned(), agent, directory, control: None, boots: 0 };
        guest.redefine(disks);
        guest
    }

    /// Defines and boots a domain, and waits until the disks are mounted and the agent answers.
    pub fn start(hypervisor: &'h Hypervisor, name: &str, disks: &[(&str, &Path)]) -> Self {
        let mut guest = Self::define(hypervisor, name, Agent::Running, disks);
        guest.boot();
        guest
    }

    /// Gives the stopped domain other active images, as after a revert.
    pub fn redefine(&self, disks: &[(&str, &Path)]) {
        let file = self.directory.join("domain.xml");
        fs::write(&file, self.xml(disks)).unwrap();
        let _ = self.hypervisor.try_virsh(&["undefine", &self.name]);
        self.hypervisor.virsh(&["define", text(&file)]);
    }

    /// Boots and waits until the disks are mounted and, where it has one, the agent answers.
    pub fn boot(&mut self) {
        self.hypervisor.virsh(&["start", &self.name]);
        self.boots += 1;
        let ready = || (self.lines().iter().filter(|line| *line == "ready").count() >= self.boots).then_some(());
        wait_for("the guest boots", BOOT, ready);
        let stream = UnixStream::connect(self.directory.join("control")).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(300))).unwrap();
        self.control = Some(BufReader::new(stream));
        if self.agent == Agent::Running {
            wait_for("the agent answers", BOOT, || self.try_agent("guest-ping").ok());
        }
    }

    /// Sends a command to the program in the guest (`guest/main.rs`), and returns its answer.
    pub fn tell(&mut self, command: &str) -> String {
        let control = self.control.as_mut().expect("the guest runs");
        writeln!(control.get_mut(), "{command}").unwrap();
        let mut line = String::new();
        control.read_line(&mut line).unwrap_or_else(|error| panic!("{command}: {error}"));
        let answer = line.trim_end().strip_prefix("ok").unwrap_or_else(|| panic!("{command}: {line}"));
        answer.trim_start().to_owned()
    }

    /// Starts the writer, which writes to all mounted disks in turn.
    pub fn start_writer(&mut self) {
        // A record that was written, but not reported as fsynced, has a number beyond the last one.
        let next = self.records().last().map_or(0, |record| record.number + 1000);
        self.tell(&format!("start {next}"));
    }

    /// Stops the writer, and returns the number of its next record.
    pub fn stop_writer(&mut self) -> u64 {
        self.tell("stop").parse().unwrap()
    }

    /// Returns the fsynced records of all boots, in order.
    pub fn records(&self) -> Vec<Written> {
        let record = |line: &String| {
            let (serial, number) = line.split_once(' ')?;
            Some(Written { serial: serial.to_owned(), number: number.parse().unwrap() })
        };
        self.lines().iter().filter_map(record).collect()
    }

    /// Returns the numbers of the fsynced records of one disk.
    pub fn records_of(&self, serial: &str) -> Vec<u64> {
        let records = self.records().into_iter();
        records.filter(|record| record.serial == serial).map(|record| record.number).collect()
    }

    /// Waits until this number of further records is fsynced.
    pub fn wait_for_records(&self, count: usize) {
        let before = self.records().len();
        wait_for("the writer writes", SHORT, || (self.records().len() >= before + count).then_some(()));
    }

    /// Adds a disk to the running guest, which mounts it.
    pub fn hot_add(&mut self, target: &str, image: &Path) {
        let file = self.directory.join("disk.xml");
        fs::write(&file, disk_xml(target, image)).unwrap();
        self.hypervisor.virsh(&["attach-device", &self.name, text(&file), "--live", "--config"]);
        wait_for("the guest finds the disk", SHORT, || {
            self.tell("mount").split_whitespace().any(|serial| serial == target).then_some(())
        });
    }

    /// Sends a signal to the agent: `STOP`, so that it hangs, or `CONT`.
    pub fn signal_agent(&mut self, signal: &str) {
        self.tell(&format!("agent {signal}"));
    }

    /// Sends a command without arguments to the agent, and returns its answer.
    pub fn try_agent(&self, command: &str) -> Result<String, String> {
        let command = format!("{{\"execute\":\"{command}\"}}");
        self.hypervisor.try_virsh(&["qemu-agent-command", "--timeout", "10", &self.name, &command])
    }

    /// Returns the active images by target, as libvirt names them.
    pub fn images(&self) -> BTreeMap<String, PathBuf> {
        let list = self.hypervisor.virsh(&["domblklist", &self.name]);
        list.lines()
            .map(|line| {
                let (target, image) = line.trim().split_once(char::is_whitespace).unwrap();
                (target.to_owned(), PathBuf::from(image.trim()))
            })
            .collect()
    }

    /// Asserts that libvirt's chain of each disk is the chain of the headers.
    pub fn assert_chains(&self) {
        let xml = self.hypervisor.virsh(&["dumpxml", &self.name]);
        for (target, image) in self.images() {
            for file in chain(&image) {
                assert!(xml.contains(&format!("'{}'", text(&file))), "{target}: {} is not in\n{xml}", file.display());
            }
        }
    }

    /// Returns true if the guest runs.
    pub fn runs(&self) -> bool {
        self.control.is_some()
    }

    /// Powers the guest off, after it unmounted its disks.
    pub fn power_off(&mut self) {
        let control = self.control.as_mut().expect("the guest runs");
        writeln!(control.get_mut(), "poweroff").unwrap();
        self.wait_until_off();
    }

    /// Destroys the domain.
    pub fn destroy(&mut self) {
        self.hypervisor.virsh(&["destroy", &self.name]);
        self.control = None;
    }

    /// Waits until the domain no longer runs.
    pub fn wait_until_off(&mut self) {
        let off = || (self.hypervisor.state(&self.name).as_deref() == Some("shut off")).then_some(());
        wait_for("the guest powers off", SHORT, off);
        self.control = None;
    }

    /// Returns the guest's serial console, for a test that fails.
    pub fn console(&self) -> String {
        fs::read_to_string(self.directory.join("console")).unwrap_or_default()
    }

    fn lines(&self) -> Vec<String> {
        let mut text = fs::read_to_string(self.directory.join("records")).unwrap_or_default();
        // The last line may be incomplete.
        text.truncate(text.rfind('\n').map_or(0, |end| end + 1));
        text.lines().map(str::to_owned).collect()
    }

    fn xml(&self, disks: &[(&str, &Path)]) -> String {
        let build = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/live");
        let mut devices: String = disks.iter().map(|(target, image)| disk_xml(target, image)).collect();
        if self.agent != Agent::NotConfigured {
            devices += "<channel type='unix'><source mode='bind'/>\
                        <target type='virtio' name='org.qemu.guest_agent.0'/></channel>";
        }
        let directory = self.directory.display();
        write!(
            devices,
            "<channel type='unix'><source mode='bind' path='{directory}/control'/>\
             <target type='virtio' name='live.control'/></channel>\
             <channel type='file'><source path='{directory}/records' append='on'/>\
             <target type='virtio' name='live.records'/></channel>\
             <serial type='file'><source path='{directory}/console' append='on'/></serial>"
        )
        .unwrap();
        let agent = if self.agent == Agent::Running { "running" } else { "absent" };
        let accelerator = fs::read_to_string(build.join("accelerator")).unwrap();
        format!(
            "<domain type='{accelerator}'><name>{name}</name><memory unit='MiB'>256</memory><vcpu>1</vcpu>\
             <os><type arch='x86_64' machine='pc'>hvm</type>\
             <kernel>{build}/vmlinuz</kernel><initrd>{build}/initramfs</initrd>\
             <cmdline>console=ttyS0 quiet mitigations=off nokaslr audit=0 cryptomgr.notests panic=-1 live.agent={agent}</cmdline></os>\
             <features><acpi/><apic/></features><on_reboot>destroy</on_reboot><on_crash>destroy</on_crash>\
             <devices>{devices}<controller type='virtio-serial'/><controller type='usb' model='none'/>\
             <memballoon model='none'/></devices></domain>",
            name = self.name,
            build = build.display(),
            accelerator = accelerator.trim(),
        )
    }
}

impl Drop for Guest<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("{}: console:\n{}", self.name, self.console());
        }
        let _ = self.hypervisor.try_virsh(&["destroy", &self.name]);
        let _ = self.hypervisor.try_virsh(&["undefine", &self.name]);
    }
}

fn disk_xml(target: &str, image: &Path) -> String {
    format!(
        "<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{}'/>\
         <target dev='{target}' bus='virtio'/><serial>{target}</serial></disk>",
        image.display()
    )
}
