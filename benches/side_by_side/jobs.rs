//! What our side does, as a process of its own.

use std::error::Error;
use std::io::Write;
use std::path::Path;

use qcow2_chain::chain::{Chain, ChainOptions, CompareOptions, Comparison, compare};
use qcow2_chain::image::{CheckOptions, check};
use qcow2_chain::merge::{AfterCommit, CommitOptions, PullOptions, commit, pull};
use qcow2_chain::storage::{Access, FileStorage};

/// Does one job on the images in a directory.
pub fn run(job: &str, dir: &Path) -> Result<(), Box<dyn Error>> {
    let open = |name: &str, writable| {
        Chain::open(dir.join(name), &ChainOptions::default().beneath(dir).with_writable(writable))
    };
    match job {
        "commit" => {
            let chain = open("top.qcow2", 2)?;
            commit(&chain, &CommitOptions::default().with_after(AfterCommit::Empty), &())?;
            chain.close()?;
        }
        "pull" => {
            let chain = open("top.qcow2", 1)?;
            pull(&chain, &PullOptions::default(), &())?;
            chain.close()?;
        }
        "check" => {
            let storage = FileStorage::open(dir.join("top.qcow2"), &Access::read())?;
            let report = check(&storage, &CheckOptions::default())?;
            if !report.is_clean() {
                return Err(format!("{report:?}").into());
            }
        }
        "map" => {
            let chain = open("top.qcow2", 0)?;
            let mut out = std::io::BufWriter::new(std::io::stdout().lock());
            for extent in chain.extents(0..chain.virtual_size()) {
                writeln!(out, "{:?}", extent?)?;
            }
        }
        "compare" => {
            let (a, b) = (open("top.qcow2", 0)?, open("twin.qcow2", 0)?);
            let found = compare(&a, &b, &CompareOptions::default(), &|| false)?;
            if found != Comparison::Same {
                return Err(format!("{found:?}").into());
            }
        }
        other => return Err(format!("no job {other}").into()),
    }
    Ok(())
}
