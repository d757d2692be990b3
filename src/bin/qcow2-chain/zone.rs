//! Seconds since the epoch as local time, for the dates of internal snapshots.

use std::path::PathBuf;

/// `2026-11-23 19:26:28` in the zone that `TZ` or `/etc/localtime` names, else in UTC.
pub(crate) fn local_time(seconds: i64) -> String {
    let zone = zone_file().and_then(|path| std::fs::read(path).ok());
    let offset = zone.and_then(|bytes| offset_at(&bytes, seconds));
    let offset = offset.or_else(|| plain_offset(&std::env::var("TZ").ok()?));
    date(seconds + offset.unwrap_or(0))
}

/// The offset of a zone given as in POSIX, a name and the hours west of Greenwich: `CET-1`, `IST-5:30`.
fn plain_offset(zone: &str) -> Option<i64> {
    let west = zone.trim_start_matches(|c: char| c.is_ascii_alphabetic());
    let (hours, minutes) = west.split_once(':').unwrap_or((west, "0"));
    let sign = if hours.starts_with('-') { 1 } else { -1 };
    let hours: i64 = hours.trim_start_matches(['+', '-']).parse().ok().filter(|hours| *hours <= 24)?;
    let minutes: i64 = minutes.parse().ok().filter(|minutes| (0..60).contains(minutes))?;
    Some(sign * (hours * 3600 + minutes * 60))
}

fn zone_file() -> Option<PathBuf> {
    match std::env::var("TZ") {
        Err(_) => Some(PathBuf::from("/etc/localtime")),
        Ok(name) => match name.trim_start_matches(':') {
            "" => None,
            path if path.starts_with('/') => Some(PathBuf::from(path)),
            name => Some(PathBuf::from("/usr/share/zoneinfo").join(name)),
        },
    }
}

/// The offset from UTC at a time, by the 64-bit part of a `TZif` file (RFC 8536). After its last transition the last
/// offset holds; files without transitions for the coming years are not made by distributions.
fn offset_at(bytes: &[u8], seconds: i64) -> Option<i64> {
    let first = Counts::read(bytes)?;
    let bytes = bytes.get(44 + first.len(4)..)?;
    let counts = Counts::read(bytes)?;
    let bytes = bytes.get(44..)?;
    let times = bytes.get(..counts.times * 8)?.chunks_exact(8);
    let past =
        times.take_while(|time| time.iter().fold(0_i64, |at, byte| at << 8 | i64::from(*byte)) <= seconds).count();
    let kind = match past.checked_sub(1) {
        Some(index) => usize::from(*bytes.get(counts.times * 8 + index)?),
        None => 0,
    };
    let entry = bytes.get(counts.times * 9 + kind * 6..)?.get(..4)?;
    Some(i64::from(i32::from_be_bytes(entry.try_into().ok()?)))
}

/// The counts in the header of one part of a `TZif` file.
struct Counts {
    isut: usize,
    isstd: usize,
    leaps: usize,
    times: usize,
    types: usize,
    chars: usize,
}

impl Counts {
    fn read(bytes: &[u8]) -> Option<Self> {
        let count = |at: usize| {
            let word = u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?);
            // More than this is no zone.
            usize::try_from(word).ok().filter(|count| *count < 1 << 16)
        };
        (bytes.get(..4)? == b"TZif").then_some(())?;
        let (isut, isstd, leaps) = (count(20)?, count(24)?, count(28)?);
        Some(Self { isut, isstd, leaps, times: count(32)?, types: count(36)?, chars: count(40)? })
    }

    /// The bytes behind the header, with times of `width` bytes.
    fn len(&self, width: usize) -> usize {
        let Self { isut, isstd, leaps, times, types, chars } = self;
        times * (width + 1) + types * 6 + chars + leaps * (width + 4) + isstd + isut
    }
}

/// A date of the Gregorian calendar; days are counted from 0000-03-01, so that leap days end a year.
fn date(seconds: i64) -> String {
    let (days, second) = (seconds.div_euclid(86_400) + 719_468, seconds.rem_euclid(86_400));
    let (era, day) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (year, month) = (era * 400 + year + i64::from(month >= 10), if month < 10 { month + 3 } else { month - 9 });
    format!("{year:04}-{month:02}-{day:02} {:02}:{:02}:{:02}", second / 3600, second / 60 % 60, second % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_follow_the_calendar() {
        for (seconds, text) in [
            (0, "1970-01-01 00:00:00"),
            (951_782_399, "2000-02-28 23:59:59"),
            (951_782_400, "2000-02-29 00:00:00"),
            (1_795_461_988, "2026-11-23 19:26:28"),
            (4_107_542_400, "2100-03-01 00:00:00"),
        ] {
            assert_eq!(date(seconds), text);
        }
    }

    #[test]
    fn plain_zones_have_offsets() {
        for (zone, offset) in
            [("UTC-3", Some(10_800)), ("EST5", Some(-18_000)), ("IST-5:30", Some(19_800)), ("UTC", None)]
        {
            assert_eq!(plain_offset(zone), offset, "{zone}");
        }
    }

    #[test]
    fn no_bytes_are_a_zone_by_force() {
        for len in 0..64 {
            assert_eq!(offset_at(&b"TZif2".repeat(20)[..len], 0), None);
        }
        assert_eq!(offset_at(&[b"TZif".as_slice(), &[0xff; 200]].concat(), 0), None);
    }
}
