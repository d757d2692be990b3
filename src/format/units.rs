//! Typed addresses: a guest offset is not a host offset, a cluster index is not a byte.

/// Defines an address type over `u64`, without operators: every sum must say what happens on overflow.
macro_rules! address {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(u64);

        impl $name {
            /// The first address.
            pub const ZERO: Self = Self(0);

            /// The address with this numeric value.
            #[must_use]
            pub const fn new(value: u64) -> Self {
                Self(value)
            }

            /// The numeric value.
            #[must_use]
            pub const fn get(self) -> u64 {
                self.0
            }

            /// The address `count` further on, or `None` past `u64::MAX`.
            #[must_use]
            pub const fn checked_add(self, count: u64) -> Option<Self> {
                match self.0.checked_add(count) {
                    Some(value) => Some(Self(value)),
                    None => None,
                }
            }

            /// The address `count` further on, at most `u64::MAX`.
            #[must_use]
            pub const fn saturating_add(self, count: u64) -> Self {
                Self(self.0.saturating_add(count))
            }

            /// How far this address lies behind `earlier`; 0 where it lies before it.
            #[must_use]
            pub const fn distance_from(self, earlier: Self) -> u64 {
                self.0.saturating_sub(earlier.0)
            }
        }

        impl core::fmt::Debug for $name {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }

        impl core::fmt::Display for $name {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    };
}

address! {
    /// A byte address on the virtual disk, as the guest sees it.
    GuestOffset
}
address! {
    /// A byte address in the image file.
    HostOffset
}
address! {
    /// The index of a cluster of the virtual disk.
    GuestCluster
}
address! {
    /// The index of a cluster of the image file.
    HostCluster
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_address_prints_as_people_write_it() {
        assert_eq!(GuestOffset::new(0x5_0000).to_string(), "0x50000");
        assert_eq!(format!("{:?}", HostCluster::new(10)), "HostCluster(0xa)");
        assert_eq!(HostOffset::default(), HostOffset::ZERO);
    }

    proptest! {
        #[test]
        fn sums_say_what_happens_on_overflow(start: u64, count: u64) {
            let at = HostOffset::new(start);
            prop_assert_eq!(at.checked_add(count).map(HostOffset::get), start.checked_add(count));
            prop_assert_eq!(at.saturating_add(count).get(), start.saturating_add(count));
            if let Some(end) = at.checked_add(count) {
                prop_assert_eq!(end.distance_from(at), count);
                prop_assert_eq!(at.distance_from(end), 0);
            }
        }
    }
}
