//! Compression and decompression of clusters. Specification: "Compressed Clusters Descriptor", "Header", byte 104.
//!
//! What is read comes from anybody: no stream makes these functions allocate more than a cluster and the decoder's own
//! tables. Decoders are kept by thread, so that a cluster costs no set-up.

use std::cell::RefCell;

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};
use zrip::{CompressContext, DecompressContext};

use crate::format::CompressionType;

/// log2 of the window of what is written: QEMU's own, which its decoders of old need. What is read may use 15.
const DEFLATE_WINDOW_BITS: u8 = 12;

/// zlib's and zstd's defaults, which QEMU uses.
const DEFLATE_LEVEL: u32 = 6;
const ZSTD_LEVEL: i32 = 3;

/// The first four bytes of a frame that decodes to nothing, but for the lowest four bits.
const ZSTD_SKIPPABLE_MAGIC: u32 = 0x184D_2A50;

thread_local! {
    static INFLATE: RefCell<Decompress> = RefCell::new(Decompress::new(false));
    static UNZSTD: RefCell<(DecompressContext, Vec<u8>)> = RefCell::new((DecompressContext::new(), Vec::new()));
    static ZSTD: RefCell<Option<CompressContext>> = const { RefCell::new(None) };
}

/// Decompresses the stream at the start of `input` into exactly one cluster. What follows the stream is ignored.
/// The error is a short reason; `cluster` then holds anything.
pub(crate) fn decompress(kind: CompressionType, input: &[u8], cluster: &mut [u8]) -> Result<(), String> {
    match kind {
        CompressionType::Deflate => INFLATE.with_borrow_mut(|decoder| inflate(decoder, input, cluster)),
        CompressionType::Zstd => {
            UNZSTD.with_borrow_mut(|(decoder, frame)| decompress_zstd(decoder, frame, input, cluster))
        }
    }
}

/// Decompresses raw deflate. A stream that goes on behind the cluster is accepted, as QEMU does.
fn inflate(decoder: &mut Decompress, input: &[u8], cluster: &mut [u8]) -> Result<(), String> {
    decoder.reset(false);
    let status = decoder
        .decompress(input, cluster, FlushDecompress::Finish)
        .map_err(|error| format!("deflate stream is broken: {}", error.message().unwrap_or("bad data")))?;
    if decoder.total_out() == cluster.len() as u64 {
        return Ok(());
    }
    let end = if status == Status::StreamEnd { "ends" } else { "is cut off" };
    Err(format!("deflate stream {end} after {} of {} bytes", decoder.total_out(), cluster.len()))
}

/// Decompresses zstd frames, one after the other, until the cluster is full. Every frame must end within the cluster.
fn decompress_zstd(
    decoder: &mut DecompressContext,
    content: &mut Vec<u8>,
    mut input: &[u8],
    cluster: &mut [u8],
) -> Result<(), String> {
    let mut filled = 0;
    while filled < cluster.len() {
        // Each turn takes at least a magic number off the input, so there is an end.
        let frame = next_zstd_frame(&mut input)
            .ok_or_else(|| format!("zstd stream ends after {filled} of {} bytes", cluster.len()))?;
        content.clear();
        decoder
            .decompress_into_with_limit(frame, content, cluster.len() - filled)
            .map_err(|error| format!("zstd stream is broken: {error}"))?;
        let end = filled + content.len();
        cluster.get_mut(filled..end).ok_or("zstd frame is larger than the cluster")?.copy_from_slice(content);
        filled = end;
    }
    Ok(())
}

/// Takes one frame off the front of `input`; `None` where there is no whole one. The decoder wants frames without
/// the padding behind them, and only the headers of the blocks tell where a frame ends.
fn next_zstd_frame<'a>(input: &mut &'a [u8]) -> Option<&'a [u8]> {
    let magic = u32::from_le_bytes(*input.first_chunk()?);
    let len = if magic & !0xf == ZSTD_SKIPPABLE_MAGIC {
        let len = u32::from_le_bytes(*input.get(4..)?.first_chunk()?);
        usize::try_from(len).ok()?.checked_add(8)?
    } else {
        zstd_frame_len(input)?
    };
    let (frame, rest) = input.split_at_checked(len)?;
    *input = rest;
    Some(frame)
}

/// The length of the frame at the start of `input`.
fn zstd_frame_len(input: &[u8]) -> Option<usize> {
    let header = zrip::frame::header::parse_frame_header(input).ok()?;
    let mut at = header.header_size;
    loop {
        let [low, middle, high] = *input.get(at..)?.first_chunk()?;
        let block = u32::from_le_bytes([low, middle, high, 0]);
        let stored = match block >> 1 & 3 {
            // One byte stands for a whole block.
            1 => 1,
            3 => return None,
            _ => usize::try_from(block >> 3).ok()?,
        };
        at = at.checked_add(3)?.checked_add(stored)?;
        if block & 1 != 0 {
            return at.checked_add(if header.content_checksum { 4 } else { 0 });
        }
    }
}

/// Compresses one cluster, or `None` where the result would not be smaller: it is then stored as it is.
pub(crate) fn compress(kind: CompressionType, cluster: &[u8]) -> Option<Vec<u8>> {
    let mut stream = vec![0; cluster.len().checked_sub(1)?];
    let len = match kind {
        CompressionType::Deflate => deflate(cluster, &mut stream)?,
        CompressionType::Zstd => compress_zstd(cluster, &mut stream)?,
    };
    stream.truncate(len);
    Some(stream)
}

/// Compresses to raw deflate; `None` where `stream` is too short.
fn deflate(cluster: &[u8], stream: &mut [u8]) -> Option<usize> {
    // A new encoder each time: one that was reset after a stream that did not end writes streams that do not decode.
    let level = Compression::new(DEFLATE_LEVEL);
    let mut encoder = Compress::new_with_window_bits(level, false, DEFLATE_WINDOW_BITS);
    match encoder.compress(cluster, stream, FlushCompress::Finish) {
        Ok(Status::StreamEnd) => usize::try_from(encoder.total_out()).ok(),
        _ => None,
    }
}

/// Compresses to one zstd frame; `None` where `stream` is too short.
fn compress_zstd(cluster: &[u8], stream: &mut [u8]) -> Option<usize> {
    ZSTD.with_borrow_mut(|encoder| {
        if encoder.is_none() {
            let mut fresh = CompressContext::new(ZSTD_LEVEL).ok()?;
            // QEMU writes none either.
            fresh.set_content_checksum(false);
            *encoder = Some(fresh);
        }
        encoder.as_mut()?.compress_into(cluster, stream).ok()
    })
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use proptest::prelude::*;

    use super::*;

    const KINDS: [CompressionType; 2] = [CompressionType::Deflate, CompressionType::Zstd];

    /// Bytes between noise and text: `symbols` different values, in runs of random length.
    fn content(seed: u64, len: usize, symbols: u64) -> Vec<u8> {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut bytes = Vec::with_capacity(len);
        while bytes.len() < len {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let run = if symbols < 256 { (state >> 40) as usize % 24 + 1 } else { 1 };
            let symbol = u8::try_from((state >> 8) % symbols).expect("at most 256 symbols");
            bytes.extend(std::iter::repeat_n(symbol, run));
        }
        bytes.truncate(len);
        bytes
    }

    fn rejected(kind: CompressionType, input: &[u8], len: usize) -> String {
        decompress(kind, input, &mut vec![0; len]).expect_err("should not decode")
    }

    #[test]
    fn what_we_compress_comes_back() {
        for kind in KINDS {
            for bits in [9, 10, 12, 14, 16, 19, 21] {
                let cluster = content(bits, 1 << bits, 7);
                let mut stream = compress(kind, &cluster).expect("compressible");
                assert!(stream.len() < cluster.len());
                // Sector padding, and another stream's bytes behind it.
                stream.extend_from_slice(&content(1, 700, 256));
                let mut back = vec![0xaa; cluster.len()];
                decompress(kind, &stream, &mut back).expect("our own stream");
                assert!(back == cluster, "{kind:?}, cluster_bits {bits}");
            }
        }
    }

    #[test]
    fn noise_is_not_compressed_and_does_not_spoil_the_encoder() {
        for kind in KINDS {
            for bits in [9, 12, 16] {
                assert_eq!(compress(kind, &content(3, 1 << bits, 256)), None);
                let cluster = content(4, 1 << bits, 3);
                let stream = compress(kind, &cluster).expect("compressible");
                let mut back = vec![0; cluster.len()];
                decompress(kind, &stream, &mut back).expect("our own stream");
                assert!(back == cluster);
            }
            assert_eq!(compress(kind, &[]), None);
        }
    }

    #[test]
    fn a_stream_that_ends_short_of_a_cluster_is_an_error() {
        for kind in KINDS {
            let stream = compress(kind, &content(5, 4096, 5)).expect("compressible");
            assert!(rejected(kind, &stream, 8192).contains("after 4096 of 8192 bytes"));
            // The last bytes may be no more than deflate's end mark, which nobody needs once the cluster is full.
            for cut in 0..stream.len() - 4 {
                rejected(kind, &stream[..cut], 4096);
            }
            // The decoder is none the worse for it.
            decompress(kind, &stream, &mut vec![0; 4096]).expect("whole again");
        }
    }

    #[test]
    fn a_bomb_gives_one_cluster_or_an_error_and_no_more() {
        let zeroes = vec![0; 8 << 20];
        let mut encoder = Compress::new(Compression::best(), false);
        let mut bomb = vec![0; 1 << 20];
        let status = encoder.compress(&zeroes, &mut bomb, FlushCompress::Finish).expect("room");
        assert_eq!(status, Status::StreamEnd);
        let mut cluster = vec![1; 65536];
        decompress(CompressionType::Deflate, &bomb, &mut cluster).expect("the first cluster of it, as QEMU reads it");
        assert!(cluster.iter().all(|&byte| byte == 0));

        // QEMU wants the frame to end with the cluster.
        let bomb = zrip::compress(&zeroes, 1).expect("compressible");
        rejected(CompressionType::Zstd, &bomb, 65536);
        // The same without a content size, as blocks of 128 KiB of one byte each.
        let mut bomb = vec![0x28, 0xb5, 0x2f, 0xfd, 0x00, 0x70];
        for _ in 0..20_000 {
            bomb.extend_from_slice(&[0x02, 0x00, 0x10, 0x00]);
        }
        bomb.extend_from_slice(&[0x03, 0x00, 0x10, 0x00]);
        rejected(CompressionType::Zstd, &bomb, 65536);
        rejected(CompressionType::Zstd, &bomb, 2 << 20);
        UNZSTD.with_borrow(|(_, content)| assert!(content.capacity() <= 4 << 20, "{}", content.capacity()));
    }

    #[test]
    fn zstd_may_come_in_several_frames() {
        let cluster = content(6, 65536, 9);
        let mut stream = Vec::new();
        for (part, skippable) in cluster.chunks(10_000).zip([0_u8, 5, 0, 3, 0, 0, 9]) {
            if skippable != 0 {
                stream.extend_from_slice(&(ZSTD_SKIPPABLE_MAGIC | 7).to_le_bytes());
                stream.extend_from_slice(&u32::from(skippable).to_le_bytes());
                stream.extend(std::iter::repeat_n(0xee, usize::from(skippable)));
            }
            stream.extend_from_slice(&zrip::compress(part, 1).expect("compressible"));
        }
        stream.extend_from_slice(&[0; 511]);
        let mut back = vec![0; cluster.len()];
        decompress(CompressionType::Zstd, &stream, &mut back).expect("several frames");
        assert!(back == cluster);

        // Frames of nothing make no progress, and must end all the same.
        let empty = zrip::compress(&[], 1).expect("an empty frame");
        rejected(CompressionType::Zstd, &empty.repeat(10_000), 65536);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(100))]

        #[test]
        fn garbage_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..600), bits in 9_u32..17) {
            let mut cluster = vec![0; 1 << bits];
            for kind in KINDS {
                let _ = decompress(kind, &bytes, &mut cluster);
            }
            let mut framed = vec![0x28, 0xb5, 0x2f, 0xfd];
            framed.extend_from_slice(&bytes);
            let _ = decompress(CompressionType::Zstd, &framed, &mut cluster);
        }

        #[test]
        fn damaged_streams_never_panic(
            seed in any::<u64>(),
            symbols in 2_u64..40,
            damage in proptest::collection::vec((any::<usize>(), any::<u8>()), 1..6),
        ) {
            let mut cluster = content(seed, 16384, symbols);
            for kind in KINDS {
                let mut stream = compress(kind, &cluster).expect("compressible");
                for &(at, value) in &damage {
                    let at = at % stream.len();
                    stream[at] = value;
                }
                let _ = decompress(kind, &stream, &mut cluster);
            }
        }
    }

    fn be64(bytes: &[u8], at: usize) -> u64 {
        u64::from_be_bytes(*bytes[at..].first_chunk().expect("within the image"))
    }

    /// Decodes every compressed cluster of an image that QEMU wrote, and tells how many there were.
    fn compare_with_image(image: &[u8], guest: &[u8], kind: CompressionType, bits: u32) -> usize {
        let (mut seen, l2_entries) = (0, 1 << (bits - 3));
        for (index, expected) in guest.chunks(1 << bits).enumerate() {
            let l1 = usize::try_from(be64(image, 40)).expect("small");
            let l2 = be64(image, l1 + index / l2_entries * 8) & 0x00ff_ffff_ffff_fe00;
            let entry = be64(image, usize::try_from(l2).expect("small") + index % l2_entries * 8);
            if entry & 1 << 62 == 0 {
                continue;
            }
            let shift = 62 - (bits - 8);
            let offset = usize::try_from(entry & ((1 << shift) - 1)).expect("small");
            let sectors = usize::try_from((entry & ((1 << 62) - 1)) >> shift).expect("small") + 1;
            let end = (offset + sectors * 512 - offset % 512).min(image.len());
            let mut cluster = vec![0; 1 << bits];
            decompress(kind, &image[offset..end], &mut cluster).expect("QEMU's own stream");
            assert!(&cluster[..expected.len()] == expected, "guest cluster {index} of {kind:?}, cluster_bits {bits}");
            seen += 1;
        }
        seen
    }

    #[test]
    fn what_qemu_compresses_is_read() {
        if Command::new("qemu-img").arg("--version").output().is_err() {
            eprintln!("SKIPPED: qemu-img is not here");
            return;
        }
        let dir = tempfile::tempdir().expect("a directory");
        let (raw, image) = (dir.path().join("raw"), dir.path().join("image"));
        let guest: Vec<u8> = (0..64).flat_map(|part| content(part, 32768, part % 13 * 9 + 2)).collect();
        std::fs::write(&raw, &guest).expect("written");
        for kind in KINDS {
            for bits in [9, 12, 16, 21] {
                let name = if kind == CompressionType::Zstd { "zstd" } else { "zlib" };
                let done = Command::new("qemu-img")
                    .args(["convert", "-c", "-f", "raw", "-O", "qcow2", "-o"])
                    .arg(format!("compression_type={name},cluster_size={}", 1 << bits))
                    .args([&raw, &image])
                    .output()
                    .expect("it runs");
                assert!(done.status.success(), "{done:?}");
                let bytes = std::fs::read(&image).expect("an image");
                let seen = compare_with_image(&bytes, &guest, kind, bits);
                assert!(seen > 0, "{name}, cluster_bits {bits}: no compressed cluster");
            }
        }
    }
}
