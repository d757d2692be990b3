//! Every sequence of what the system may answer, up to some calls: all, a part, a signal, the end,
//! an error.

use super::*;

/// The result of one call.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Answer {
    /// So many bytes, or what is left.
    Some(usize),
    Interrupted,
    End,
    Failed,
}

const ANSWERS: [Answer; 6] =
    [Answer::Some(1), Answer::Some(4), Answer::Some(100), Answer::Interrupted, Answer::End, Answer::Failed];
/// The number of scripted calls. Later calls are complete.
const CALLS: u32 = 5;
const LEN: usize = 12;
const OFFSET: u64 = 1000;

/// A system that does as it is told, call by call.
struct Script {
    answers: Vec<Answer>,
    calls: usize,
    /// The bytes that are known to be done.
    done: usize,
}

/// The expected result of a script: the bytes done, and the failure if any.
#[derive(Debug, PartialEq)]
struct Expected {
    done: usize,
    ended: bool,
    failed: bool,
    calls: usize,
}

impl Script {
    /// Answers a call for the bytes from `at` on.
    fn answer(&mut self, at: u64, left: usize) -> io::Result<usize> {
        assert_eq!((at, left), (OFFSET + self.done as u64, LEN - self.done), "it goes on where it was");
        let answer = self.answers.get(self.calls).copied().unwrap_or(Answer::Some(LEN));
        self.calls += 1;
        match answer {
            Answer::Some(bytes) => {
                self.done += bytes.min(left);
                Ok(bytes.min(left))
            }
            Answer::Interrupted => Err(io::ErrorKind::Interrupted.into()),
            Answer::End => Ok(0),
            Answer::Failed => Err(io::Error::other("the medium")),
        }
    }

    fn expected(&self) -> Expected {
        let mut expected = Expected { done: 0, ended: false, failed: false, calls: 0 };
        for answer in self.answers.iter().copied().chain([Answer::Some(LEN)]) {
            if expected.done == LEN {
                break;
            }
            expected.calls += 1;
            match answer {
                Answer::Some(bytes) => expected.done += bytes.min(LEN - expected.done),
                Answer::Interrupted => {}
                Answer::End => expected.ended = true,
                Answer::Failed => expected.failed = true,
            }
            if expected.ended || expected.failed {
                break;
            }
        }
        expected
    }
}

/// Every script there is. The test hands back what came of it.
fn each_script(mut test: impl FnMut(&mut Script) -> io::Result<()>) {
    let mut failures = 0;
    for number in 0..ANSWERS.len().pow(CALLS) {
        let answers = (0..CALLS).map(|call| ANSWERS[number / ANSWERS.len().pow(call) % ANSWERS.len()]).collect();
        let mut script = Script { answers, calls: 0, done: 0 };
        let expected = script.expected();
        let result = test(&mut script);
        assert_eq!((script.done, script.calls), (expected.done, expected.calls), "{:?}", script.answers);
        assert_eq!(result.is_err(), expected.failed, "{:?}: {result:?}", script.answers);
        if let Err(error) = result {
            assert_eq!((error.kind(), error.to_string().as_str()), (io::ErrorKind::Other, "the medium"));
            failures += 1;
        }
    }
    assert!(failures > 500, "{failures}");
}

fn content() -> Vec<u8> {
    (1..).take(LEN).collect()
}

#[test]
fn read_fills_all_or_fails() {
    each_script(|script| {
        let mut buf = [0xee; LEN];
        let result = read(&mut buf, OFFSET, |part, at| {
            let (from, left) = (script.done, part.len());
            let read = script.answer(at, left)?;
            part[..read].copy_from_slice(&content()[from..from + read]);
            Ok(read)
        });
        if result.is_ok() {
            assert_eq!(buf[..script.done], content()[..script.done]);
            assert_eq!(buf[script.done..], vec![0; LEN - script.done]);
        }
        result
    });
}

#[test]
fn write_completes_or_fails() {
    each_script(|script| {
        let mut file = [0; LEN];
        let result = write(&content(), OFFSET, |part, at| {
            let from = script.done;
            let written = script.answer(at, part.len())?;
            file[from..from + written].copy_from_slice(&part[..written]);
            Ok(written)
        });
        assert_eq!(file[..script.done], content()[..script.done]);
        assert_eq!(file[script.done..], vec![0; LEN - script.done]);
        match result {
            // A system that writes nothing is not asked for ever.
            Err(error) if error.kind() == io::ErrorKind::WriteZero => {
                assert!(script.expected().ended);
                Ok(())
            }
            Ok(()) => {
                assert_eq!(script.done, LEN);
                Ok(())
            }
            failed => failed,
        }
    });
}

#[test]
fn copy_returns_the_bytes_copied() {
    each_script(|script| {
        let copied = copy(LEN as u64, |done, left| {
            let copied = script.answer(OFFSET + done, usize::try_from(left).unwrap())?;
            Ok(copied as u64)
        })?;
        assert_eq!(copied, script.done as u64);
        Ok(())
    });
}

#[test]
fn write_units_stops_at_a_partial_unit() {
    let answers = [(vec![4, 8], 12), (vec![4, 3], 4), (vec![4, 0], 4), (vec![8, 4], 12), (vec![1], 0)];
    for (written, whole) in answers {
        let mut calls = written.iter();
        let mut at = OFFSET;
        let done = write_units(&content(), OFFSET, 4, |part, offset| {
            assert_eq!((part, offset), (&content()[usize::try_from(at - OFFSET).unwrap()..], at));
            let written = *calls.next().expect("no call after one that was no unit");
            at += written as u64;
            Ok(written)
        });
        assert_eq!(done, whole, "{written:?}");
    }
    let mut calls = 0;
    let done = write_units(&content(), OFFSET, 4, |_, _| {
        calls += 1;
        match calls {
            1 | 3 => Err(io::ErrorKind::Interrupted.into()),
            2 => Ok(4),
            _ => Err(io::Error::other("the medium")),
        }
    });
    assert_eq!((done, calls), (4, 4));
}

#[test]
fn nothing_is_read_past_the_largest_offset() {
    let mut buf = [0xee; 8];
    let ask = |part: &mut [u8], at: u64| {
        assert_eq!((part.len(), at), (3, MAX_LEN - 3));
        part.fill(1);
        Ok(3)
    };
    read(&mut buf, MAX_LEN - 3, ask).unwrap();
    assert_eq!(buf, [1, 1, 1, 0, 0, 0, 0, 0]);
    read(&mut buf, u64::MAX - 1, |_, _| unreachable!("there is nothing")).unwrap();
    assert_eq!(buf, [0; 8]);
}
