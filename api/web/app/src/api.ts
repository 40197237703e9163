// What the agent sends, as api/web and view have it, and how it is asked.

export interface Row {
  service: string;
  connectionsPerSecond: number;
  failuresPerSecond: number;
  inFlight: number;
  rttSeconds?: number;
  responseSeconds?: number;
  usable: number;
  backends: number;
  source: string;
  balance: string;
  listen: string[];
  verdict: "serving" | "panic" | "refused";
  why?: string;
  states?: Record<string, number>;
  out: number;
}

export interface Head {
  host: string;
  time: string;
  everySeconds: number;
  error?: string;
  healthy: boolean;
  problems: string[];
  warnings: string[];
  agent: { version: string; pid: number; started: string; revision: number; config: { file: string; loaded: string; error?: string } } | null;
  services: number;
  listeners: number;
  refusing: number;
  backends: Record<string, number> | null;
  connections?: { inFlight: number; translated: number; refused: number; reset: number };
  hooks: Record<string, boolean> | null;
}

export interface Look {
  whole: boolean;
  head: Head;
  rows: Row[];
  gone: string[];
}

export interface Probe {
  probe: string;
  result: string;
  message?: string;
  last?: string;
  tookSeconds?: number;
  inARow?: number;
  succeeded: number;
  failed: number;
}

export interface Backend {
  address: string;
  weight: number;
  group: number;
  zone?: string;
  state: string;
  takes: boolean;
  why?: string;
  since: string;
  inFlight: number;
  rttSeconds?: number;
  responseSeconds?: number;
  connections: number;
  failed: number;
  ejections: number;
  probe?: Probe;
}

export interface Service {
  name: string;
  source: string;
  listen: string[];
  balance: string;
  onDown: string;
  listeners: { listen: string; verdict: string; to: string[]; total: number; why?: string }[];
  backends: Backend[];
  refused: number;
  packets?: { listen: string; from: string[]; balance: string; backends: string[] }[];
}

/** The last 15 minutes of a backend, oldest first. */
export interface Lines {
  inFlight: number[];
  failed: number[];
  responseSeconds: number[];
}

export interface Detail {
  name: string;
  error?: string;
  service: Service | null;
  more: number;
  takes: number;
  total: number;
  history: Record<string, Lines>;
  everySeconds: number;
}

export interface Flow {
  time: string;
  event: string;
  pid?: number;
  command?: string;
  client?: string;
  service?: string;
  protocol: string;
  vip?: string;
  backend?: string;
  proxy?: string;
  target?: string;
  via?: string[];
  user?: string;
  outcome: string;
  rttSeconds?: number;
  durationSeconds?: number;
  sent?: number;
  received?: number;
}

export interface Flows {
  flows: Flow[] | null;
  skipped?: number;
  lost?: number;
  error?: string;
}

export interface Explanation {
  destination: string;
  service?: string;
  verdict: string;
  works: boolean;
  conclusion: string;
  steps: { code: string; what: string; found: string }[];
  backends?: { address: string; group: number; weight: number; state: string; takes: boolean }[];
}

export interface Parts {
  proxies: { name: string; protocol: string[]; listen: string[]; missing?: string[]; open: number; connections: number; failed: number }[] | null;
  forwards: { name: string; listen?: string; remote?: string; to: string; via: string[]; up: boolean; why?: string; open: number }[] | null;
  announcements: {
    vips: { address: string; services: string[]; missing?: string; to: string[] | null; notTo?: string[]; l2?: { owner?: string; here: boolean; problem?: string } }[] | null;
    peers: { address: string; as: number; state: string; established: boolean; why?: string; prefixes: number; bfd?: { state: string } }[] | null;
  };
  blocks: { prefixes: string[]; host: string; draining: boolean; own: boolean; used?: number }[] | null;
  pods: { pod: string; addresses: string[]; device: string; mtu: number }[] | null;
  captures: { name: string; mode: string; protocol: string[]; whose: string; where: string; to: string[]; proxy?: string; onProxyDown: string }[] | null;
  errors: string[];
}

/** The server wants a token, or another one. The page asks for it when it hears of tokenNeeded. */
export class NeedsToken extends Error {
  constructor() {
    super("the token is needed");
  }
}

export const tokenNeeded = "pentad-token-needed";

const key = "pentad-token";

/** The token is kept for as long as the tab is open, and sent in a header only: no other page can have it sent. */
export const token = {
  get: (): string => sessionStorage.getItem(key) ?? "",
  set: (value: string): void => sessionStorage.setItem(key, value),
  /** Only these characters can be in a token: the agent refuses others, and a header cannot hold them all. */
  possible: (value: string): boolean => /^[\x21-\x7e]+$/.test(value),
};

async function ask(path: string, init: RequestInit = {}): Promise<Response> {
  const headers = new Headers(init.headers);
  if (token.possible(token.get())) headers.set("Authorization", "Bearer " + token.get());
  const answer = await fetch(path, { ...init, headers, cache: "no-store" });
  if (answer.status === 401) {
    dispatchEvent(new Event(tokenNeeded));
    throw new NeedsToken();
  }
  return answer;
}

async function readAnswer<T>(answer: Response): Promise<T> {
  const text = await answer.text();
  if (!(answer.headers.get("Content-Type") ?? "").startsWith("application/json")) throw new Error(text.trim());
  const value = JSON.parse(text);
  if (!answer.ok) throw new Error(value.error);
  return value;
}

export async function get<T>(path: string, signal?: AbortSignal): Promise<T> {
  return readAnswer(await ask(path, { signal }));
}

export async function post<T>(path: string, body: unknown): Promise<T> {
  return readAnswer(await ask(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) }));
}

/**
 * Follows server-sent events until the signal. EventSource cannot send the token, so the
 * stream is read here; one that breaks is begun again.
 */
export async function follow(path: string, signal: AbortSignal, on: (event: string, data: any) => void, state: (error: Error | null) => void): Promise<void> {
  while (!signal.aborted) {
    let reader: ReadableStreamDefaultReader<string> | undefined;
    try {
      const answer = await ask(path, { signal });
      if (!answer.ok || !answer.body) throw new Error((await answer.text()).trim());
      reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
      state(null);
      // Text comes in pieces: of a large event they are put together once.
      const pieces: string[] = [];
      for (;;) {
        const { value, done } = await reader.read();
        if (done) break;
        pieces.push(value);
        if (!value.includes("\n\n") && !(value.startsWith("\n") && pieces.length > 1)) continue;
        const events = pieces.join("").split("\n\n");
        pieces.length = 0;
        pieces.push(events.pop()!);
        for (const e of events) {
          const at = e.indexOf("\ndata: ");
          on(e.slice("event: ".length, at), JSON.parse(e.slice(at + 7)));
        }
      }
      throw new Error("the agent has ended the connection");
    } catch (error) {
      if (signal.aborted) return;
      state(error as Error);
      if (error instanceof NeedsToken) return;
      await new Promise((resolve) => setTimeout(resolve, 1000));
    } finally {
      void reader?.cancel().catch(() => undefined);
    }
  }
}
