//! `check`: finds what is wrong in an image, and repairs it if asked.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::PathBuf;

use qcow2_chain::chain::Format;
use qcow2_chain::image::{self, CheckOptions, CheckReport, Fix};
use qcow2_chain::storage::Access;

use crate::failure::{Failure, Outcome};
use crate::json::Json;
use crate::open;
use crate::options::{Unserved, cache_mode, looking};
use crate::output::{Form, say};

/// Check an image for errors
///
/// Exit codes: 0 no errors (or all repaired), 1 the check itself failed, 2 the image has errors, 3 it has leaked clusters
/// only, 63 the format knows no checks.
#[derive(clap::Args, Debug)]
#[command(args_override_self = true)]
pub(crate) struct Args {
    /// The image's format (qcow2)
    #[arg(short, long, value_name = "FMT")]
    format: Option<String>,
    /// Say nothing
    #[arg(short, long)]
    quiet: bool,
    /// Take no locks: look at an image that another program holds
    #[arg(short = 'U', long)]
    force_share: bool,
    /// Repair: leaks (leaked clusters only) or all (everything that can be)
    #[arg(short, long, value_enum, value_name = "WHAT")]
    repair: Option<Repair>,
    /// Accepted and without effect
    #[arg(short = 'T', long, value_name = "CACHE")]
    cache: Option<String>,
    /// The form of the output
    #[arg(long, value_enum, default_value = "human")]
    output: Form,
    #[command(flatten)]
    unserved: Unserved,
    /// The image
    file: PathBuf,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Repair {
    Leaks,
    All,
}

/// Does it.
pub(crate) fn run(args: &Args) -> Outcome {
    args.unserved.refuse()?;
    cache_mode(args.cache.as_deref())?;
    if args.repair.is_some() && args.force_share {
        return Err(Failure::new("--repair and --force-share exclude each other"));
    }
    if open::format(&args.file, args.format.as_deref())? == Format::Raw {
        return Err(Failure::new("This image format does not support checks").with_code(63));
    }
    let access = match args.repair {
        Some(_) => Access::write(),
        None => Access::read().with_lock(looking(args.force_share)),
    };
    let storage = open::file(&args.file, &access)?;
    let mut options = CheckOptions::default();
    options.fix = match args.repair {
        None => Fix::Nothing,
        Some(Repair::Leaks) => Fix::Leaks,
        Some(Repair::All) => Fix::All,
    };
    let report = image::check(&*storage, &options)?;
    tell_findings(&report);
    // A check that did not come to its end found no end of the image either; qemu-img prints nothing of it then.
    if report.check_errors > 0 && report.image_end_offset == 0 {
        return Err(Failure::new("Check failed: the refcounts would have to be built anew, which takes -r all"));
    }
    match args.output {
        Form::Human => say(args.quiet, text(&report).trim_end())?,
        Form::Json => say(args.quiet, &json(&report, &args.file.to_string_lossy()).pretty())?,
    }
    if report.check_errors > 0 {
        return Err(Failure::new("Check failed"));
    }
    Ok(match report {
        CheckReport { corruptions: 1.., .. } => 2,
        CheckReport { leaks: 1.., .. } => 3,
        _ => 0,
    })
}

/// The single findings go to standard error, whatever the form of the output, as qemu-img's do.
fn tell_findings(report: &CheckReport) {
    let mut out = std::io::stderr().lock();
    for finding in &report.findings {
        let _ = writeln!(out, "{finding}");
    }
    if report.findings_omitted > 0 {
        let _ = writeln!(out, "... and {} more", report.findings_omitted);
    }
}

fn text(report: &CheckReport) -> String {
    let mut out = String::new();
    let CheckReport { corruptions, leaks, check_errors, corruptions_fixed, leaks_fixed, .. } = report;
    if *corruptions_fixed > 0 || *leaks_fixed > 0 {
        out.push_str("The following inconsistencies were found and repaired:\n\n");
        let _ = writeln!(out, "    {leaks_fixed} leaked clusters\n    {corruptions_fixed} corruptions\n");
        out.push_str("Double checking the fixed image now...\n");
    }
    if *corruptions == 0 && *leaks == 0 && *check_errors == 0 {
        out.push_str("No errors were found on the image.\n");
    }
    if *corruptions > 0 {
        let _ = writeln!(out, "\n{corruptions} errors were found on the image.");
        out.push_str("Data may be corrupted, or further writes to the image may corrupt it.\n");
    }
    if *leaks > 0 {
        let _ = writeln!(out, "\n{leaks} leaked clusters were found on the image.");
        out.push_str("This means waste of disk space, but no harm to data.\n");
    }
    if *check_errors > 0 {
        let _ = writeln!(out, "\n{check_errors} internal errors have occurred during the check.");
    }
    let (allocated, total) = (report.allocated_clusters, report.total_clusters);
    if allocated > 0 && total > 0 {
        let _ = writeln!(
            out,
            "{allocated}/{total} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters",
            percent(allocated, total),
            percent(report.fragmented_clusters, allocated),
            percent(report.compressed_clusters, allocated),
        );
    }
    if report.image_end_offset > 0 {
        let _ = writeln!(out, "Image end offset: {}", report.image_end_offset);
    }
    out
}

#[expect(clippy::cast_precision_loss, reason = "two digits are printed")]
fn percent(part: u64, whole: u64) -> f64 {
    part as f64 * 100.0 / whole as f64
}

/// The members in QEMU's order; what is nothing is left out.
fn json(report: &CheckReport, filename: &str) -> Json {
    let always = |name, value: Json| Some((name, value));
    let unless_zero = |name, value: u64| (value != 0).then(|| (name, value.into()));
    let members = [
        unless_zero("image-end-offset", report.image_end_offset),
        unless_zero("compressed-clusters", report.compressed_clusters),
        unless_zero("total-clusters", report.total_clusters),
        unless_zero("corruptions", report.corruptions),
        unless_zero("corruptions-fixed", report.corruptions_fixed),
        always("check-errors", report.check_errors.into()),
        unless_zero("leaks", report.leaks),
        unless_zero("leaks-fixed", report.leaks_fixed),
        unless_zero("allocated-clusters", report.allocated_clusters),
        always("filename", filename.into()),
        always("format", "qcow2".into()),
        unless_zero("fragmented-clusters", report.fragmented_clusters),
    ];
    Json::Object(members.into_iter().flatten().collect())
}
