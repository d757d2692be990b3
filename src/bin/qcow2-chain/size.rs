//! Sizes as qemu-img reads and prints them.

/// `832 KiB`: three significant digits and the largest fitting binary unit.
pub(crate) fn human(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
    let mut unit = 0;
    let mut scale = 1_u128;
    // A unit begins at 1000 of the one before, not at 1024, so that there are never more than three digits.
    while u128::from(bytes) >= 1000 * scale && unit + 1 < UNITS.len() {
        scale *= 1024;
        unit += 1;
    }
    format!("{} {}B", three_digits(u128::from(bytes), scale), UNITS[unit])
}

/// `value / scale` as C's `%.3g` prints it: `1e+03` where rounding reaches a fourth digit. At most 1000.
fn three_digits(value: u128, scale: u128) -> String {
    // Thousandths, hundredths, tenths or ones: as many decimals as three digits leave.
    for decimals in (0..=3_u32).rev() {
        let digits = round_to_even(value * 10_u128.pow(decimals), scale);
        if digits >= 1000 {
            continue;
        }
        let text = if decimals == 0 {
            digits.to_string()
        } else {
            let divisor = 10_u128.pow(decimals);
            format!("{}.{:0width$}", digits / divisor, digits % divisor, width = decimals as usize)
        };
        return if decimals == 0 { text } else { text.trim_end_matches('0').trim_end_matches('.').to_owned() };
    }
    "1e+03".to_owned()
}

fn round_to_even(value: u128, scale: u128) -> u128 {
    let (quotient, rest) = (value / scale, value % scale);
    match (rest * 2).cmp(&scale) {
        std::cmp::Ordering::Less => quotient,
        std::cmp::Ordering::Greater => quotient + 1,
        std::cmp::Ordering::Equal => quotient + quotient % 2,
    }
}

/// Reads a size: decimal with an optional fraction and suffix (`b k M G T P E`, any case, powers of 1024), or
/// hexadecimal without either. `None` for what is no size below 2^64.
pub(crate) fn parse(text: &str) -> Option<u64> {
    if let Some(hex) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        let digits = !hex.is_empty() && hex.bytes().all(|byte| byte.is_ascii_hexdigit());
        return digits.then(|| u64::from_str_radix(hex, 16).ok()).flatten();
    }
    let (number, shift) = match text.char_indices().last()? {
        (_, '0'..='9' | '.') => (text, 0),
        (at, suffix) => {
            let power = "bkmgtpe".find(suffix.to_ascii_lowercase())?;
            (&text[..at], 10 * u32::try_from(power).ok()?)
        }
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let digits = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
    if !digits(whole) || !digits(fraction) || (whole.is_empty() && fraction.is_empty()) {
        return None;
    }
    let whole = if whole.is_empty() { 0 } else { whole.parse::<u64>().ok()? };
    let whole = whole.checked_mul(1 << shift)?;
    // A fraction of a byte is no size; more than 18 digits of a fraction change nothing.
    if fraction.is_empty() {
        return Some(whole);
    }
    if shift == 0 && fraction.bytes().any(|digit| digit != b'0') {
        return None;
    }
    let fraction = &fraction[..fraction.len().min(18)];
    let scale = 10_u128.pow(u32::try_from(fraction.len()).ok()?);
    let part = ((fraction.parse::<u128>().ok()? << shift) + scale / 2) / scale;
    whole.checked_add(u64::try_from(part).ok()?)
}

/// The size as a multiple of `unit`, rounded up; `None` past 2^63.
pub(crate) fn round_up(size: u64, unit: u64) -> Option<u64> {
    size.checked_next_multiple_of(unit).filter(|size| i64::try_from(*size).is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_print_with_three_digits() {
        for (bytes, text) in [
            (0, "0 B"),
            (1, "1 B"),
            (999, "999 B"),
            (1000, "0.977 KiB"),
            (1024, "1 KiB"),
            (852_480, "832 KiB"),
            (1_245_696, "1.19 MiB"),
            (2_297_856, "2.19 MiB"),
            (1000 * 1024 - 1, "1e+03 KiB"),
            (1000 * 1024, "0.977 MiB"),
            (1 << 62, "4 EiB"),
            (u64::MAX, "16 EiB"),
        ] {
            assert_eq!(human(bytes), text, "{bytes}");
        }
    }

    #[test]
    fn sizes_are_read_as_qemu_reads_them() {
        for (text, size) in [
            ("0", Some(0)),
            ("1000001", Some(1_000_001)),
            ("64k", Some(65536)),
            ("64K", Some(65536)),
            ("1.5M", Some(1_572_864)),
            ("1.7k", Some(1741)),
            ("1b", Some(1)),
            ("0x100000", Some(1 << 20)),
            ("7E", Some(7 << 60)),
            ("16E", None),
            ("1.5", None),
            ("1e3", None),
            ("1X", None),
            ("-1", None),
            ("", None),
            ("k", None),
            ("0x", None),
            ("+1", None),
        ] {
            assert_eq!(parse(text), size, "{text}");
        }
    }
}
