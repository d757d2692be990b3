//! The table: what each side took, and the ratios.

use crate::run::{Calls, Sample};
use crate::works::{Program, Side, Target, Work};

/// What one side took.
pub(crate) struct Outcome<'a> {
    pub(crate) side: &'a Side,
    pub(crate) warm_up: Option<Sample>,
    /// From the fastest to the slowest.
    pub(crate) samples: Vec<Sample>,
    pub(crate) calls: Option<Calls>,
}

impl<'a> Outcome<'a> {
    pub(crate) fn new(side: &'a Side) -> Self {
        Self { side, warm_up: None, samples: Vec::new(), calls: None }
    }

    fn median(&self) -> f64 {
        self.samples[self.samples.len() / 2].time.as_secs_f64()
    }

    fn cpu(&self) -> f64 {
        let mut all: Vec<_> = self.samples.iter().map(|sample| sample.cpu).collect();
        all.sort_unstable();
        all[all.len() / 2].as_secs_f64()
    }

    fn rss(&self) -> u64 {
        self.samples.iter().map(|sample| sample.rss).max().unwrap_or_default()
    }
}

/// Prints each work as it is done, and keeps one line of each for the end.
#[derive(Default)]
pub(crate) struct Table {
    lines: Vec<String>,
}

impl Table {
    pub(crate) fn add(&mut self, work: &Work, outcomes: Vec<Outcome<'_>>) {
        println!("\n{}", work.name);
        println!(
            "  {:<15} {:>9} {:>9} {:>9} {:>5} {:>8} {:>9} {:>11} {:>6}",
            "", "min", "median", "max", "runs", "CPU", "RSS", "calls/GiB", "syncs"
        );
        for outcome in &outcomes {
            print(work, outcome);
        }
        let of = |find: &dyn Fn(&Outcome) -> bool| {
            outcomes.iter().filter(|outcome| find(outcome)).min_by(|a, b| a.median().total_cmp(&b.median()))
        };
        let ours = of(&|outcome| outcome.side.name == "ours");
        let theirs = of(&|outcome| matches!(outcome.side.program, Program::QemuImg | Program::QemuIo));
        let peer = of(&|outcome| outcome.side.program == Program::Peer);
        let floor = of(&|outcome| outcome.side.name == "floor");
        let Some(ours) = ours else { return };
        let by_ours = |other: Option<&Outcome>| other.map(|other| other.median() / ours.median());
        let (ratio, by_peer) = (by_ours(theirs), by_ours(peer));
        // Less than a few steps of the clock say nothing.
        let of_cpu = theirs.filter(|_| ours.cpu() >= 0.05).map(|theirs| theirs.cpu() / ours.cpu());
        let by_floor = floor.map(|floor| ours.median() / floor.median());
        let verdict = match work.target {
            Some(Target::Qemu(least)) => verdict(ratio, least),
            Some(Target::Peers) => verdict(by_peer, 1.0),
            None => "-".to_owned(),
        };
        let number = |number: Option<f64>| number.map_or("-".to_owned(), ratio_text);
        let cell = |outcome: Option<&Outcome>| {
            outcome.map_or("-".to_owned(), |outcome| {
                format!("{}, {} MiB", time(outcome.median()), outcome.rss().div_ceil(1024))
            })
        };
        self.lines.push(format!(
            "| {} | {} | {} | {} | {} | {} | {} | {verdict} |",
            work.name,
            cell(theirs),
            cell(Some(ours)),
            number(ratio),
            number(of_cpu),
            number(by_peer),
            number(by_floor),
        ));
    }

    /// The lines as a table in Markdown.
    pub(crate) fn summary(&self) {
        println!(
            "\n| work | QEMU's tools | ours | QEMU / ours | the same of CPU time | best peer / ours | ours / floor | target |"
        );
        println!("|---|---|---|---|---|---|---|---|");
        for line in &self.lines {
            println!("{line}");
        }
    }
}

fn print(work: &Work, outcome: &Outcome<'_>) {
    let time_of = |index: usize| time(outcome.samples[index].time.as_secs_f64());
    let (calls, syncs) = match (outcome.calls, work.moves) {
        (Some(calls), Some(moves)) => {
            let gib = moves as f64 / f64::from(1 << 30);
            (format!("{:.0}", calls.all as f64 / gib), calls.syncs.to_string())
        }
        _ => ("-".to_owned(), "-".to_owned()),
    };
    println!(
        "  {:<15} {:>9} {:>9} {:>9} {:>5} {:>8} {:>5} MiB {:>11} {:>6}",
        outcome.side.name,
        time_of(0),
        time(outcome.median()),
        time_of(outcome.samples.len() - 1),
        outcome.samples.len(),
        format!("{:.2} s", outcome.cpu()),
        outcome.rss().div_ceil(1024),
        calls,
        syncs
    );
}

fn verdict(ratio: Option<f64>, least: f64) -> String {
    match ratio {
        None => format!("{least}: not measured"),
        Some(ratio) if ratio >= least => format!("{least}: met"),
        Some(_) => format!("{least}: missed"),
    }
}

fn time(seconds: f64) -> String {
    if seconds < 0.1 { format!("{:.1} ms", seconds * 1e3) } else { format!("{seconds:.2} s") }
}

fn ratio_text(ratio: f64) -> String {
    if ratio < 10.0 { format!("{ratio:.2}") } else { format!("{ratio:.0}") }
}
