//! The choices that make a world, before it is built.

use super::access::{ACCESSES, Access};
use super::names::{NAMINGS, Naming};
use super::world::Grounds;
use crate::support::rng::Rng;

/// The directories of the images.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    One,
    Two,
    TwoFileSystems,
}

/// Links in a world.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Link {
    None,
    /// The images are named by symbolic links.
    Image,
    /// The images are named through a symbolic link to their directory.
    Directory,
    /// The catalogue is sometimes named by a symbolic link.
    Catalogue,
    /// The first image has a second name.
    Hard,
}

/// The path of the catalogue on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    Absolute,
    Here,
    Elsewhere,
}

/// A world before it is built.
#[derive(Clone, Debug)]
pub struct Recipe {
    pub layout: Layout,
    pub naming: Naming,
    pub link: Link,
    pub call: Call,
    pub access: Access,
    pub template: bool,
    pub twin: bool,
    pub clones: bool,
    pub bystanders: bool,
    /// The first volume is on a loop device.
    pub device: bool,
    pub raw: bool,
    pub volumes: usize,
    /// The number of files beneath each active one that are taken in as snapshots.
    pub adopted: usize,
    pub absolute_names: bool,
    pub catalogue_above: bool,
    /// Some operations are done by the library instead of the program.
    pub library: bool,
}

impl Recipe {
    /// A world without anything unusual.
    pub fn plain() -> Self {
        Self {
            layout: Layout::One,
            naming: Naming::Plain,
            link: Link::None,
            call: Call::Absolute,
            access: Access::Own,
            template: false,
            twin: false,
            clones: false,
            bystanders: false,
            device: false,
            raw: false,
            volumes: 1,
            adopted: 0,
            absolute_names: false,
            catalogue_above: false,
            library: false,
        }
    }

    /// A random world that can be built on these grounds.
    pub fn random(grounds: &Grounds, rng: &mut Rng) -> Self {
        let mut recipe = Self::plain();
        recipe.volumes = usize::try_from(rng.within(1..4)).unwrap();
        recipe.raw = rng.chance(1, 3);
        recipe.library = rng.chance(1, 4);
        if rng.chance(1, 8) {
            return recipe;
        }
        recipe.layout = rng.pick(&[Layout::One, Layout::One, Layout::Two, Layout::Two, Layout::TwoFileSystems]);
        if rng.chance(1, 2) {
            recipe.naming = rng.pick(&NAMINGS);
        }
        if rng.chance(1, 2) {
            recipe.link = rng.pick(&[Link::Image, Link::Directory, Link::Catalogue, Link::Hard]);
        }
        recipe.call = rng.pick(&[Call::Absolute, Call::Here, Call::Elsewhere]);
        if rng.chance(1, 2) {
            recipe.access = rng.pick(&ACCESSES);
        }
        recipe.template = rng.chance(1, 4);
        recipe.twin = rng.chance(1, 5);
        recipe.clones = rng.chance(1, 4);
        recipe.bystanders = rng.chance(1, 3);
        recipe.device = rng.chance(1, 16);
        recipe.adopted = usize::try_from(rng.within(0..5)).unwrap().saturating_sub(2);
        recipe.absolute_names = rng.chance(1, 3);
        recipe.catalogue_above = rng.chance(1, 2);
        recipe.fit(grounds);
        recipe
    }

    /// Takes back what cannot be built.
    fn fit(&mut self, grounds: &Grounds) {
        if !grounds.root {
            (self.access, self.device) = (Access::Own, false);
        }
        if !grounds.accesses.contains(&self.access) {
            self.access = Access::Owned;
        }
        if grounds.other.is_none() && self.layout == Layout::TwoFileSystems {
            self.layout = Layout::Two;
        }
        if self.layout != Layout::One {
            self.volumes = self.volumes.max(2);
        }
        if self.device {
            // A device is opened by its own node, with root's rights.
            (self.adopted, self.access, self.naming) = (0, Access::Own, Naming::Plain);
            (self.template, self.link) = (false, Link::None);
        }
        if matches!(self.naming, Naming::ByteDirectory | Naming::Bytes) {
            // The VM itself may be refused; the second VM may not.
            self.twin = false;
        }
        if self.link == Link::Image {
            // QEMU resolves a relative backing name beside the link.
            self.absolute_names = true;
        }
    }

    /// The rows of the table of results that this world counts for.
    pub fn labels(&self) -> Vec<String> {
        let mut labels = vec![
            format!("layout: {:?}", self.layout),
            self.naming.label().to_owned(),
            format!("link: {:?}", self.link),
            format!("catalogue path: {:?}", self.call),
            self.access.label().to_owned(),
        ];
        let flags = [
            (self.template, "template"),
            (self.twin, "VM of the same name"),
            (self.clones, "clones"),
            (self.bystanders, "bystanders"),
            (self.device, "loop device"),
            (self.raw, "raw"),
            (self.adopted > 0, "existing chain"),
            (self.library, "library"),
        ];
        labels.extend(flags.into_iter().filter(|(on, _)| *on).map(|(_, label)| label.to_owned()));
        labels
    }

    /// Returns `true` if `vm init` may refuse this world by the rules of a set.
    pub fn may_refuse_init(&self) -> bool {
        // A colon and other bytes than UTF-8 are supported or refused; so is a second name of an
        // image.
        matches!(self.naming, Naming::Colon | Naming::Bytes | Naming::ByteDirectory) || self.link == Link::Hard
    }

    /// Returns `true` if the directory of the world can be moved: no path in it is absolute.
    pub fn movable(&self) -> bool {
        let above = self.catalogue_above || (self.layout == Layout::One && !self.template);
        self.layout != Layout::TwoFileSystems
            && !self.absolute_names
            && matches!(self.link, Link::None | Link::Hard)
            && above
            && !(self.twin || self.clones || self.device)
    }
}
