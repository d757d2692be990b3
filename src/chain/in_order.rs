//! Work that several threads do and one takes in, in order.

use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, SyncSender, channel, sync_channel};
use std::sync::{Mutex, PoisonError};

/// The most threads that are started.
pub(crate) const MAX_THREADS: usize = 64;

/// How many threads are worth starting: one for each processor, within reason.
pub(crate) fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from).min(MAX_THREADS)
}

/// Has every task that `next` gives done by one of so many threads, and hands each result to `take`, in the order of the
/// tasks. At most two more tasks than there are threads are under way or waiting to be taken.
///
/// # Errors
/// The first error, in the order of the tasks, of `next`, `work` or `take`; nothing is begun after it.
pub(crate) fn in_order<T: Send, R: Send, E: Send>(
    threads: usize,
    next: &mut dyn FnMut() -> Result<Option<T>, E>,
    work: &(dyn Fn(T) -> Result<R, E> + Sync),
    take: &mut dyn FnMut(R) -> Result<(), E>,
) -> Result<(), E> {
    let (orders, queue) = channel::<Order<T, R, E>>();
    let queue = &Mutex::new(queue);
    std::thread::scope(|scope| {
        let orders = orders; // dropped when this is done, which ends the workers
        let mut waiting: VecDeque<Receiver<Result<R, E>>> = VecDeque::new();
        let mut started = 0;
        loop {
            // One task more than there are threads waits for a free one, and one is being taken.
            while waiting.len() <= threads {
                let Some(task) = next()? else { break };
                if started < threads {
                    scope.spawn(move || serve(queue, work));
                    started += 1;
                }
                let (result, receiver) = sync_channel(1);
                waiting.push_back(receiver);
                if orders.send((task, result)).is_err() {
                    break; // see below
                }
            }
            // A result that never comes is that of a worker who panicked, which the scope hands on.
            let Some(Ok(result)) = waiting.pop_front().map(|oldest| oldest.recv()) else { return Ok(()) };
            take(result?)?;
        }
    })
}

/// A task, and where its result goes.
type Order<T, R, E> = (T, SyncSender<Result<R, E>>);

/// Serves orders until there are no more.
fn serve<T, R, E>(queue: &Mutex<Receiver<Order<T, R, E>>>, work: &(dyn Fn(T) -> Result<R, E> + Sync)) {
    loop {
        let next = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok((task, result)) = next else { return };
        // Whoever asked may have given up; then the orders end, too.
        let _ = result.send(work(task));
    }
}

#[cfg(test)]
mod tests {
    use super::super::Error;
    use super::*;

    #[test]
    fn results_come_in_the_order_of_the_tasks() {
        let mut tasks = 0..100_u64;
        let mut taken = Vec::new();
        let slow_at_first = |task: u64| {
            std::thread::sleep(std::time::Duration::from_micros(500 * (3 - task % 4)));
            Ok::<u64, Error>(task * task)
        };
        in_order(4, &mut || Ok(tasks.next()), &slow_at_first, &mut |result| {
            taken.push(result);
            Ok(())
        })
        .unwrap();
        assert_eq!(taken, (0..100).map(|task| task * task).collect::<Vec<u64>>());
    }

    #[test]
    fn the_first_failure_ends_it() {
        let mut begun = 0..;
        let work = |task: u64| if task == 5 { Err(Error::Cancelled) } else { Ok(task) };
        let mut taken = Vec::new();
        let failed = in_order(3, &mut || Ok(begun.next()), &work, &mut |result| {
            taken.push(result);
            Ok(())
        });
        assert!(matches!(failed, Err(Error::Cancelled)));
        assert_eq!(taken, [0, 1, 2, 3, 4]);
        assert!(begun.start <= 10, "{begun:?}");
    }
}
