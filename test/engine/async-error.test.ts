import { afterEach, describe, expect, it } from 'vitest';
import { AsyncErrorPoll } from '../../src/engine/async-error.js';
import { sleep, until } from '../helpers/running.js';

const poll = new AsyncErrorPoll();
afterEach(() => poll.stop());

describe('errors of a device collective between its calls', () => {
  it('end the call that waits for a lost peer, with the collective’s own words, once', async () => {
    let error = '';
    let aborts = 0;
    poll.start({ collectiveError: () => error, abort: () => aborts++ });
    await sleep(250);
    expect([aborts, poll.error]).toEqual([0, '']);
    error = 'nccl: remote process exited or there was a network error';
    await until(() => aborts > 0, 2000);
    error = 'nccl: told to stop waiting';
    await sleep(250);
    expect([aborts, poll.error]).toEqual([1, 'nccl: remote process exited or there was a network error']);
  });
});
