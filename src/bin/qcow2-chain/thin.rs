//! `convert -B`: a new overlay that reads as the source does and holds only what its backing file does not.
//!
//! The overlay begins on the source, where it reads right without holding anything, and is rebased from there: it reads right
//! at every instant, whenever it is interrupted.

use std::path::Path;
use std::sync::Arc;

use qcow2_chain::chain::{Chain, Format, Layer, Node};
use qcow2_chain::image::{Image, Preallocation};
use qcow2_chain::merge::{self, Onto, RebaseOptions};
use qcow2_chain::storage::{LockMode, MemoryStorage};

use crate::commit::with_progress;
use crate::create::{create_options, durable_name, empty_file};
use crate::failure::{Failure, Outcome};
use crate::open;
use crate::options::{PolicyArgs, directory};
use crate::planning::cancelled;
use crate::settings::Settings;

/// The backing file of a new image, as the command line gives it.
pub(crate) struct Base {
    name: String,
    format: Format,
}

/// The backing file that the settings name, if they name one.
pub(crate) fn base(settings: &Settings, format: Format) -> Result<Option<Base>, Failure> {
    let name = settings.get("backing_file").filter(|name| !name.is_empty());
    let Some(name) = name else {
        let alone = settings.get("backing_fmt").is_some();
        let why = || Failure::new("Backing format cannot be used without backing file");
        return if alone { Err(why()) } else { Ok(None) };
    };
    if format == Format::Raw {
        return Err(Failure::new("Backing file not supported for file format 'raw'"));
    }
    let explicit = || Failure::new("Use of backing file requires explicit backing format");
    let format = open::named_format(settings.get("backing_fmt").ok_or_else(explicit)?)?;
    if settings.get("preallocation").is_some_and(|mode| mode != "off") {
        return Err(Failure::unserved("-o preallocation with a backing file", "one of the two"));
    }
    Ok(Some(Base { name: name.to_owned(), format }))
}

/// Refuses what does not go with a backing file.
pub(crate) fn refuse_unfit(compress: bool, no_create: bool, snapshot: bool) -> Result<(), Failure> {
    let given = [
        (compress, "-c with -B", "-c for an image without a backing file"),
        (no_create, "-n with -B", "create -b, and then rebase"),
        (snapshot, "-l with -B", "convert -l, and then rebase -b"),
    ];
    let refused = given.iter().find(|(given, ..)| *given);
    refused.map_or(Ok(()), |(_, option, instead)| Err(Failure::unserved(option, instead)))
}

impl Base {
    /// The chain of the backing file, by a name that is relative to the new image.
    pub(crate) fn open(&self, target: &Path, policy: &PolicyArgs) -> Result<Chain, Failure> {
        let path = directory(target).join(&self.name);
        let path = path.strip_prefix(".").unwrap_or(&path);
        Chain::open(path, &policy.chain_options(path, self.format, LockMode::Read)).map_err(open::explain)
    }

    /// Makes the overlay.
    pub(crate) fn convert(
        &self,
        base: &Chain,
        source: Chain,
        target: &Path,
        settings: &Settings,
        progress: bool,
    ) -> Outcome {
        let mut options = create_options(settings, source.virtual_size())?;
        options.preallocation = Preallocation::Off;
        let top = source.top();
        let path = std::path::absolute(&top.path)?.into_os_string().into_encoded_bytes();
        options.backing = Some((path, top.format().name().as_bytes().to_vec()));
        Image::create(Arc::new(MemoryStorage::new("new image")), &options)?.close()?;
        let node = Node::Qcow2(Image::create(empty_file(target)?, &options)?);
        durable_name(target)?;
        let chain = Chain::from_layers(Layer { node, path: target.to_owned() }, source.into_layers());
        let rebase = RebaseOptions::default().with_backing_file(self.name.as_bytes());
        let done = with_progress(progress, |face| merge::rebase(&chain, Onto::Chain(base), &rebase, face));
        done.map_err(|error| match error {
            merge::Error::Cancelled => {
                let file = target.display();
                cancelled(&format!("{file} reads as the source, and still stands on it"))
            }
            error => error.into(),
        })?;
        chain.close()?;
        Ok(0)
    }
}
